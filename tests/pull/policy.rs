//! Signature policy. The proxy reads `/etc/containers/policy.json`; a test pulls in a mount namespace of
//! its own where another file is bound over it.

use std::fs;
use std::process::Command;

use node_store::image::{Kind, Source};
use serde_json::{Value, json};

use super::fixture::run;
use super::{Bench, image, settings};

const POLICY: &str = "/etc/containers/policy.json";

#[test]
fn unsigned_images_are_refused_where_the_policy_wants_signatures() {
    assert!(fs::metadata(POLICY).is_ok(), "{POLICY} must be there to bind over it");
    let bench = Bench::new();
    let spec = bench.push(&image(&bench, 1, 1), "os:1");
    let key = bench.path("key.pem");
    let private = bench.path("private.pem");
    let (key_path, private_path) = (key.to_str().unwrap(), private.to_str().unwrap());
    run("openssl", &["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", private_path]);
    run("openssl", &["ec", "-in", private_path, "-pubout", "-out", key_path]);
    let accept = json!([{ "type": "insecureAcceptAnything" }]);
    let reject = json!([{ "type": "reject" }]);
    let signed_by = json!([{ "type": "signedBy", "keyType": "GPGKeys", "keyPath": key_path }]);
    let sigstore = json!([{ "type": "sigstoreSigned", "keyPath": key_path }]);
    let for_registry = |requirement: &Value| json!({ "default": reject, "transports": { "docker": { bench.registry.address.clone(): requirement } } });
    for (what, policy, expected) in [
        ("accepts this registry", for_registry(&accept), "resolved"),
        ("rejects all", json!({ "default": reject }), "policy"),
        ("wants a GPG signature", for_registry(&signed_by), "policy"),
        ("wants a sigstore signature", for_registry(&sigstore), "policy"),
        ("is malformed", json!({ "default": "?" }), "policy"),
    ] {
        let file = bench.path("policy.json");
        fs::write(&file, policy.to_string()).unwrap();
        let script = format!("mount --bind {} {POLICY} && exec \"$0\" \"$@\"", file.display());
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "policy::child_resolve", "--nocapture"])
            .env("PIVOT_CHILD", &spec)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        println!("{what}: {told}");
        assert!(told.contains(&format!("answer: {expected}")), "{what}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of unsigned_images_are_refused_where_the_policy_wants_signatures"]
async fn child_resolve() {
    let Ok(spec) = std::env::var("PIVOT_CHILD") else { return };
    let answer = match Source::open(&settings()).await.unwrap().resolve(&spec.parse().unwrap()).await {
        Ok(_) => "resolved".to_owned(),
        Err(told) => {
            assert!(told.kind != Kind::Policy || told.to_string().contains(POLICY), "{told}");
            format!("{} ({told})", told.kind.as_str())
        }
    };
    println!("answer: {answer}");
}
