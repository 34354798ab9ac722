//! Release payloads: from a payload image to the node image that it names.

use std::collections::BTreeMap;
use std::fs;

use node_store::image::{Kind, PullSpec, Source, TagHints, resolve_release};
use serde_json::json;

use super::fixture::{Image, run};
use super::layers::{Item, dir, file, layer};
use super::tree::noise;
use super::{Bench, settings};

const FILE: &str = "release-manifests/image-references";

fn references(tags: &[(&str, &str)]) -> String {
    let tags: Vec<_> = tags
        .iter()
        .map(|(name, from)| json!({ "name": name, "from": { "kind": "DockerImage", "name": from } }))
        .collect();
    json!({ "kind": "ImageStream", "apiVersion": "image.openshift.io/v1", "spec": { "tags": tags } }).to_string()
}

fn configured(names: &[String]) -> TagHints {
    TagHints { configured: Some(names.to_vec()), ..TagHints::default() }
}

/// An image without any ostree labels.
fn payload(layers: &[Vec<Item>]) -> Image {
    Image {
        commit: String::new(),
        layers: layers.iter().map(|items| layer(items)).collect(),
        final_layer: 0,
        architecture: "amd64".into(),
        labels: BTreeMap::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_names_the_node_image() {
    let bench = Bench::new();
    let os = format!("q.io/release/art@sha256:{}", "ab".repeat(32));
    let named = references(&[("etcd", "q.io/x:1"), ("stream-coreos", &os)]);
    let operator = |seed: u8| vec![file("usr/bin/operator", &hex::encode(noise(300_000, seed)))];
    let old = || vec![dir("release-manifests"), file(FILE, &references(&[("rhel-coreos", "q.io/old:1")]))];
    let tags: Vec<String> = ["rhel-coreos", "rhel-coreos-10", "stream-coreos"].map(str::to_owned).to_vec();
    let hidden = vec![file("release-manifests/.wh.image-references", "")];
    for (name, layers, expected) in [
        ("newest", vec![operator(1), old(), vec![dir("release-manifests"), file(FILE, &named)]], Ok(os.as_str())),
        ("below", vec![operator(2), vec![file(FILE, &named)], operator(3), vec![]], Ok(&os)),
        ("hidden", vec![operator(4), vec![file(FILE, &named)], hidden], Err("not a release payload")),
        ("plain", vec![operator(5)], Err("not a release payload")),
        ("tags", vec![vec![file(FILE, &references(&[("etcd", &os), ("rhel-coros", &os)]))]], Err("rhel-coros, etcd")),
        ("by-tag", vec![vec![file(FILE, &references(&[("rhel-coreos", "q.io/os:4.99")]))]], Err("has no digest")),
        ("garbage", vec![vec![file(FILE, "{")]], Err("not an ImageStream")),
    ] {
        let spec: PullSpec = bench.push(&payload(&layers), &format!("release:{name}")).parse().unwrap();
        if expected.is_ok() {
            // Whatever is below the file is not fetched: it is not even there.
            let layout = format!("oci:{}", bench.path("layout").display());
            let manifest: serde_json::Value =
                serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
            fs::remove_file(bench.registry.blob(manifest["layers"][0]["digest"].as_str().unwrap())).unwrap();
        }
        let source = Source::open(&settings()).await.unwrap();
        match (resolve_release(&source, &spec, &configured(&tags)).await, expected) {
            (Ok((found, _)), Ok(expected)) => assert_eq!(found.to_string(), expected, "{name}"),
            (Err(told), Err(words)) => {
                println!("{told}");
                assert_eq!(told.kind, Kind::BadFormat, "{name}: {told}");
                let text = told.to_string();
                assert!(text.contains(words) && text.contains("/release@sha256:"), "{name}: {text}");
                assert!(text.contains("give the pull spec of a release payload"), "{text}");
            }
            (found, _) => panic!("{name}: {found:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_of_the_booted_system_is_chosen() {
    let bench = Bench::new();
    let os = |byte: &str| format!("q.io/os@sha256:{}", byte.repeat(32));
    let tag = |name: &str, class: &str, from: &str| {
        let annotations = json!({ "io.openshift.os.streamclass": class });
        json!({ "name": name, "annotations": annotations, "from": { "kind": "DockerImage", "name": from } })
    };
    let tags = json!([
        tag("rhel-coreos-10", "rhel-10", &os("10")),
        tag("rhel-coreos", "rhel-9", &os("09")),
        tag("rhel-coreos-extensions", "rhel-9", &os("ee")),
    ]);
    let stream = json!({ "kind": "ImageStream", "spec": { "tags": tags } }).to_string();
    let spec: PullSpec = bench.push(&payload(&[vec![file(FILE, &stream)]]), "release:1").parse().unwrap();
    let source = Source::open(&settings()).await.unwrap();
    let el9 = Some("ID=rhel\nVERSION_ID=9.6\n".to_owned());
    for (hints, expected, reason) in [
        (TagHints { os_release: el9.clone(), ..TagHints::default() }, "09", "the booted system is el9"),
        (
            TagHints { script: Some("coreos_img=rhel-coreos-10".into()), os_release: el9, ..TagHints::default() },
            "10",
            "node-image-pull.sh names it",
        ),
    ] {
        let (found, choice) = resolve_release(&source, &spec, &hints).await.unwrap();
        assert_eq!(found.to_string(), os(expected), "{choice}");
        assert!(choice.to_string().contains(reason), "{choice}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_altered_payload_is_refused() {
    let bench = Bench::new();
    let os = |byte: &str| format!("q.io/os@sha256:{}", byte.repeat(32));
    let mut image = payload(&[vec![file(FILE, &references(&[("rhel-coreos", &os("aa"))]))]]);
    image.layers[0].compress = super::Compress::None;
    let spec: PullSpec = bench.push(&image, "release:1").parse().unwrap();
    let digest = {
        let layout = format!("oci:{}", bench.path("layout").display());
        let manifest: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
        manifest["layers"][0]["digest"].as_str().unwrap().to_owned()
    };
    let blob = bench.registry.blob(&digest);
    let altered = String::from_utf8(fs::read(&blob).unwrap()).unwrap().replace(&os("aa"), &os("bb"));
    fs::write(&blob, altered).unwrap();
    let source = Source::open(&settings()).await.unwrap();
    let told = resolve_release(&source, &spec, &configured(&["rhel-coreos".to_owned()])).await.unwrap_err();
    assert_eq!(told.kind, Kind::BadDigest, "{told}");
    assert!(told.message.contains(&digest), "{told}");
}
