//! Signatures, through a skopeo whose image proxy enforces `policy.json` (1.13 and later): signed images are
//! pulled, all others are refused before anything of them is stored.
//!
//! skopeo reads what is below `/etc/containers`, so each pull runs in a child, in a mount namespace where
//! another directory is bound over that.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use node_store::PullProgress;
use node_store::image::{Class, ImageSettings, Source};
use node_store::import::pull;
use node_store::store::NodeStore;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::derived::complete;
use super::fixture::run;
use super::registry::free_address;
use super::{Bench, fsck, image, settings};

/// The directory of a skopeo that enforces the policy; unpacked by the test bed's scripts, not installed.
fn new_skopeo() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/build.sh");
    PathBuf::from(run("bash", &[script.to_str().unwrap(), "skopeo"]).trim())
}

/// Directory that a child gets in place of `/etc/containers`, and the keys.
pub struct Trust<'a> {
    bench: &'a Bench,
    pub skopeo: PathBuf,
}

impl<'a> Trust<'a> {
    pub fn new(bench: &'a Bench) -> Self {
        let trust = Self { bench, skopeo: new_skopeo() };
        for dir in ["containers/registries.d", "gnupg", "lookaside"] {
            fs::create_dir_all(bench.path(dir)).unwrap();
        }
        fs::set_permissions(bench.path("gnupg"), fs::Permissions::from_mode(0o700)).unwrap();
        let lookaside = bench.path("lookaside");
        let here = &bench.registry.address;
        trust.put("registries.d/here.yaml", &lookaside_at(here, &format!("file://{}", lookaside.display())));
        trust.put("registries.conf", &format!("[[registry]]\nlocation = '{here}'\ninsecure = true\n"));
        trust.put("policy.json", &json!({ "default": accept() }).to_string());
        fs::write(bench.path("passphrase"), "").unwrap();
        trust
    }

    pub fn text(&self, name: &str) -> String {
        self.bench.path(name).to_str().unwrap().to_owned()
    }

    pub fn put(&self, name: &str, content: &str) {
        fs::write(self.bench.path("containers").join(name), content).unwrap();
    }

    /// A command in the namespace.
    fn command(&self, program: &Path, skopeo: Option<&Path>) -> Command {
        let script = format!("mount --bind {} /etc/containers && exec \"$0\" \"$@\"", self.text("containers"));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).arg(program);
        let path = std::env::var("PATH").unwrap();
        if let Some(skopeo) = skopeo {
            command.env("PATH", format!("{}:{path}", skopeo.display()));
        }
        command.env("GNUPGHOME", self.bench.path("gnupg"));
        // A policy of the user's own would come before the one that is bound.
        command.env("HOME", self.bench.path("home"));
        command
    }

    pub fn skopeo(&self, args: &[&str]) {
        let output = self.command(Path::new("skopeo"), Some(&self.skopeo)).args(args).output().unwrap();
        assert!(output.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Makes a GPG key; its public half is `NAME.gpg`.
    fn gpg_key(&self, name: &str) {
        let home = self.text("gnupg");
        let user = format!("{name}@example.test");
        let common = ["--homedir", home.as_str(), "--batch", "--quiet", "--passphrase", ""];
        run("gpg", &[&common[..], &["--quick-generate-key", &user, "default", "sign", "never"]].concat());
        run("gpg", &[&common[..], &["--output", &self.text(&format!("{name}.gpg")), "--export", &user]].concat());
    }

    /// Makes a sigstore key pair: `NAME.private` and `NAME.pub`.
    fn sigstore_key(&self, name: &str) {
        let (prefix, passphrase) = (self.text(name), self.text("passphrase"));
        self.skopeo(&["generate-sigstore-key", "--output-prefix", &prefix, "--passphrase-file", &passphrase]);
    }

    /// Copies what was pushed as `from` to `to`, with further arguments that say how to sign it.
    fn copy(&self, from: &str, to: &str, args: &[&str]) -> String {
        let (source, target) = (format!("docker://{from}"), format!("docker://{}/{to}", self.bench.registry.address));
        self.skopeo(
            &[&["copy", "--quiet", "--preserve-digests"][..], args, &[source.as_str(), target.as_str()]].concat(),
        );
        target.strip_prefix("docker://").unwrap().to_owned()
    }

    /// Pulls in the namespace, in two steps with a proxy each, as the agent does.
    pub fn pull(&self, spec: &str, store: &str, skopeo: Option<&Path>) -> Value {
        let root = self.bench.path(store);
        fs::create_dir_all(&root).unwrap();
        let output = self
            .command(&std::env::current_exe().unwrap(), skopeo)
            .args(["--ignored", "--exact", "signed::child_pull", "--nocapture"])
            .env("PIVOT_CHILD", spec)
            .env("PIVOT_STORE", &root)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let answer = told.lines().find_map(|line| line.split_once("answer: "));
        let (_, answer) = answer.unwrap_or_else(|| panic!("{told}{}", String::from_utf8_lossy(&output.stderr)));
        serde_json::from_str(answer).unwrap()
    }

    /// Checks that the policy has refused the image permanently, with a helpful error, and that the store is empty.
    pub fn refused(&self, what: &str, spec: &str, skopeo: Option<&Path>) {
        let store = format!("refused {what}").replace(' ', "-");
        let answer = self.pull(spec, &store, skopeo);
        println!("{what}: {answer}");
        let told = answer["told"].as_str().unwrap_or_else(|| panic!("{what}: {answer}"));
        assert_eq!(answer["kind"], "policy", "{what}: {told}");
        assert_eq!(answer["permanent"], true, "{what}: {told}");
        for words in [spec, "/etc/containers/policy.json", "signature"] {
            assert!(told.contains(words), "{what}: {words}: {told}");
        }
        let stored = run(
            "find",
            &[&self.text(&store), "-name", "*.file", "-o", "-name", "*.commit", "-o", "-path", "*refs/*/*"],
        );
        assert_eq!(stored, "", "{what}: nothing is left in the store");
    }

    fn accepted(&self, what: &str, spec: &str, commit: &str) {
        let store = format!("accepted {what}").replace(' ', "-");
        let answer = self.pull(spec, &store, Some(&self.skopeo));
        assert_eq!(answer["commit"], commit, "{what}: {answer}");
        fsck(&self.bench.path(&store).join("repo"));
    }
}

pub fn accept() -> Value {
    json!([{ "type": "insecureAcceptAnything" }])
}

/// `default` refuses; images of `registry` have to meet `requirement`.
fn policy(registry: &str, requirement: Value) -> String {
    json!({ "default": [{ "type": "reject" }], "transports": { "docker": { registry: [requirement] } } }).to_string()
}

fn lookaside_at(registry: &str, url: &str) -> String {
    format!("docker:\n  {registry}:\n    lookaside: {url}\n    use-sigstore-attachments: true\n")
}

#[test]
fn signatures_decide() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let unsigned = bench.push(&image, "os:unsigned");
    let trust = Trust::new(&bench);
    let here = bench.registry.address.as_str();
    for name in ["ours", "theirs"] {
        trust.gpg_key(name);
        trust.sigstore_key(name);
    }
    let (passphrase, private) = (trust.text("passphrase"), |name: &str| trust.text(&format!("{name}.private")));
    let by_gpg =
        |name: &str| trust.copy(&unsigned, &format!("gpg-{name}:1"), &["--sign-by", &format!("{name}@example.test")]);
    let by_sigstore = |name: &str| {
        let args = ["--sign-by-sigstore-private-key", &private(name), "--sign-passphrase-file", &passphrase];
        trust.copy(&unsigned, &format!("sigstore-{name}:1"), &args)
    };
    let (gpg, gpg_theirs) = (by_gpg("ours"), by_gpg("theirs"));
    let (sigstore, sigstore_theirs) = (by_sigstore("ours"), by_sigstore("theirs"));
    let new = Some(trust.skopeo.as_path());

    trust.put(
        "policy.json",
        &policy(here, json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": trust.text("ours.gpg") })),
    );
    trust.accepted("with our GPG key", &gpg, &image.commit);
    trust.refused("GPG wanted and not signed", &unsigned, new);
    trust.refused("GPG key of others", &gpg_theirs, new);
    trust.refused("GPG wanted and signed with sigstore", &sigstore, new);

    trust.put("policy.json", &policy(here, json!({ "type": "sigstoreSigned", "keyPath": trust.text("ours.pub") })));
    trust.accepted("with our sigstore key", &sigstore, &image.commit);
    trust.refused("sigstore wanted and not signed", &unsigned, new);
    trust.refused("sigstore key of others", &sigstore_theirs, new);
    trust.refused("sigstore wanted and signed with GPG", &gpg, new);

    trust.put("policy.json", &json!({ "default": [{ "type": "reject" }] }).to_string());
    trust.refused("all rejected", &gpg, new);
    trust.put("policy.json", &json!({ "default": "?" }).to_string());
    trust.refused("malformed policy", &gpg, new);
}

/// The policy is about the name that was asked for, wherever the bytes come from, with both kinds of skopeo.
#[test]
fn a_mirror_does_not_evade_the_policy() {
    const NAME: &str = "registry.example.test";
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let unsigned = bench.push(&image, "os:unsigned");
    let trust = Trust::new(&bench);
    let mirror = bench.registry.address.as_str();
    trust.gpg_key("ours");
    let args = ["--sign-by", "ours@example.test", "--sign-identity", &format!("{NAME}/signed:1")];
    trust.copy(&unsigned, "signed:1", &args);
    trust.put(
        "registries.conf",
        &format!("[[registry]]\nlocation = '{NAME}'\n[[registry.mirror]]\nlocation = '{mirror}'\ninsecure = true\n"),
    );
    let signed_by = || json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": trust.text("ours.gpg") });
    trust.put("policy.json", &policy(NAME, signed_by()));
    trust.accepted("signed, from a mirror", &format!("{NAME}/signed:1"), &image.commit);
    for (which, skopeo) in [("new", Some(trust.skopeo.as_path())), ("host", None)] {
        trust.put("policy.json", &policy(NAME, signed_by()));
        trust.refused(&format!("{which} unsigned from a mirror"), &format!("{NAME}/os:unsigned"), skopeo);
        let open_mirror = json!({ "type": "insecureAcceptAnything" });
        trust.put("policy.json", &policy(mirror, open_mirror));
        trust.refused(&format!("{which} only the mirror is trusted"), &format!("{NAME}/os:unsigned"), skopeo);
    }
}

/// The agent resolves with one proxy and pulls with the next: what is signed as an index must stay accepted when
/// its manifest for this machine is opened by digest, and only that.
#[test]
fn a_signed_index_covers_its_manifests() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let mut foreign = image.clone();
    foreign.architecture = "s390x".into();
    let layout = bench.path("index");
    let instance = image.write_with(&foreign, &layout);
    let index = bench.registry.push(&layout, "multi:1");
    let trust = Trust::new(&bench);
    trust.gpg_key("ours");
    // Only the index is signed: by hand, into the place where its signature is looked for.
    let raw = bench.path("index.raw");
    let spec = format!("docker://{index}");
    fs::write(&raw, run("skopeo", &["inspect", "--raw", "--tls-verify=false", &spec])).unwrap();
    let digest = run("sha256sum", &[raw.to_str().unwrap()]);
    let place = bench.path("lookaside").join(format!("multi@sha256={}", &digest[..64]));
    fs::create_dir_all(&place).unwrap();
    let signature = place.join("signature-1");
    let fingerprint =
        run("gpg", &["--homedir", &trust.text("gnupg"), "--with-colons", "--list-keys", "ours@example.test"]);
    let fingerprint =
        fingerprint.lines().find_map(|line| line.strip_prefix("fpr:")).unwrap().trim_matches(':').to_owned();
    trust.skopeo(&[
        "standalone-sign",
        raw.to_str().unwrap(),
        &index,
        &fingerprint,
        "--output",
        signature.to_str().unwrap(),
    ]);
    let requirement = json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": trust.text("ours.gpg") });
    trust.put("policy.json", &policy(&bench.registry.address, requirement));
    trust.accepted("index", &index, &image.commit);
    let alone = format!("{}@{instance}", index.strip_suffix(":1").unwrap());
    trust.refused("the manifest alone", &alone, Some(&trust.skopeo));
}

/// A signature server that does not answer is a transient failure: another attempt may get the signatures.
#[test]
fn unavailable_signatures_are_retried() {
    let bench = Bench::new();
    let spec = bench.push(&image(&bench, 1, 1), "os:1");
    let trust = Trust::new(&bench);
    trust.gpg_key("ours");
    let here = bench.registry.address.as_str();
    trust.put("registries.d/here.yaml", &lookaside_at(here, &format!("http://{}", free_address())));
    let requirement = json!({ "type": "signedBy", "keyType": "GPGKeys", "keyPath": trust.text("ours.gpg") });
    trust.put("policy.json", &policy(here, requirement));
    let answer = trust.pull(&spec, "store", Some(&trust.skopeo));
    assert_eq!((&answer["kind"], &answer["permanent"]), (&json!("network"), &json!(false)), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of the tests above"]
async fn child_pull() {
    let Ok(spec) = std::env::var("PIVOT_CHILD") else { return };
    let store = NodeStore::on_tmpfs(Path::new(&std::env::var("PIVOT_STORE").unwrap()), None).unwrap();
    // Insecure registries are registries.conf's business here.
    let settings = ImageSettings { insecure: false, ..settings() };
    let outcome = async {
        let image = Source::open(&settings).await?.resolve(&spec.parse()?).await?;
        let source = Source::open(&settings).await?;
        let progress = Arc::new(PullProgress::default());
        pull(&source, &image, &store, None, &complete(), progress, &CancellationToken::new()).await
    };
    let answer = match outcome.await {
        Ok(pulled) => json!({ "commit": pulled.commit, "pinned": pulled.image.pinned }),
        Err(told) => json!({
            "kind": told.kind.as_str(),
            "permanent": told.class == Class::Permanent,
            "class": format!("{:?}", told.class),
            "told": told.to_string(),
        }),
    };
    println!("answer: {answer}");
}
