//! Indexes as builders write them: with attestations, and nested.

use node_store::image::Kind;
use serde_json::{Value, json};

use super::fixture::{Image, blob, index, write_index};
use super::layers::layer;
use super::plain::{labelled_system, plain};
use super::{Bench, failure, image, try_pull};

/// A manifest with an attestation about another one, as BuildKit adds it to an index.
fn attestation(layout: &std::path::Path, subject: &Value) -> Value {
    let statement = blob(layout, br#"{"_type":"https://in-toto.io/Statement/v0.1"}"#, "application/vnd.in-toto+json");
    let config = json!({ "architecture": "unknown", "os": "unknown", "config": {},
                         "rootfs": { "type": "layers", "diff_ids": [statement["digest"]] } });
    let config = blob(layout, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [statement] }).to_string();
    let mut descriptor = blob(layout, manifest.as_bytes(), media_type);
    descriptor["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
    descriptor["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest",
                                        "vnd.docker.reference.digest": subject["digest"] });
    descriptor
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_in_an_index_is_pulled() {
    let bench = Bench::new();
    indexed(&bench, "encapsulated", &image(&bench, 1, 1)).await;
    indexed(&bench, "plain", &plain(vec![layer(&labelled_system())])).await;
}

async fn indexed(bench: &Bench, kind: &str, image: &Image) {
    let layout = bench.path(kind);
    image.write(&layout);
    let spec = format!("oci:{}", layout.display());
    let expected = try_pull(&spec, &bench.store(&format!("{kind}-bare"), None), None).await.unwrap().commit;
    let written: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
    let bare = written["manifests"][0].clone();
    let platform = json!({ "architecture": image.architecture, "os": "linux" });
    let mut own = bare.clone();
    own["platform"] = platform.clone();
    let attested = attestation(&layout, &own);
    let mut nested = index(&layout, &[own.clone(), attested.clone()]);
    let unnamed = nested.clone();
    nested["platform"] = platform;
    for (name, entries, pulled) in [
        ("last", vec![attested.clone(), own.clone()], Ok(())),
        ("first", vec![own.clone(), attested.clone()], Ok(())),
        ("alone", vec![attested.clone()], Err((Kind::WrongArchitecture, "no image found"))),
        // skopeo chooses only once.
        ("nested", vec![attested.clone(), nested], Err((Kind::BadFormat, "names another index"))),
        ("unnamed", vec![unnamed], Err((Kind::BadFormat, "names another index"))),
    ] {
        let top = index(&layout, &entries);
        write_index(&layout, &top);
        let name = format!("{kind}-{name}");
        let store = bench.store(&name, None);
        match pulled {
            Ok(()) => {
                let pulled = try_pull(&spec, &store, None).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(
                    (pulled.commit, pulled.image.digest),
                    (expected, own["digest"].as_str().unwrap().parse().unwrap()),
                    "{name}"
                );
            }
            Err((kind, words)) => {
                let told = failure(&spec, &store).await;
                assert!(told.kind == kind && told.to_string().contains(words), "{name}: {told}");
            }
        }
    }
    write_index(&layout, &attested);
    let told = failure(&spec, &bench.store(&format!("{kind}-attestation"), None)).await;
    assert!(told.kind == Kind::WrongArchitecture && told.message.contains("is for unknown"), "{told}");
}
