//! Wrong bytes at each place that a pull reads: each is found by the checksum of that place.

use std::collections::HashSet;

use node_store::image::{Class, Kind};
use node_store::import::PullOptions;
use node_store::store::BootedRepo;
use serde_json::Value;

use super::faults::{Fault, Faults};
use super::fixture::{Repo, run};
use super::{Bench, failure, image, try_pull_with};

fn inspect(spec: &str) -> Value {
    let spec = format!("docker://{spec}");
    serde_json::from_str(&run("skopeo", &["inspect", "--raw", "--tls-verify=false", &spec])).unwrap()
}

/// A registry, or a proxy before it, that answers with other bytes than those asked for.
#[tokio::test(flavor = "multi_thread")]
async fn altered_answers_are_found() {
    let bench = Bench::new();
    let new = image(&bench, 1, 1);
    let mut foreign = new.clone();
    foreign.architecture = "s390x".into();
    let layout = bench.path("index");
    let instance = new.write_with(&foreign, &layout);
    let index = bench.registry.push(&layout, "os:index");
    let repository = index.strip_suffix(":index").unwrap().to_owned();
    let faults = Faults::before(&bench.registry.address);
    let through = |spec: &str| spec.replace(&bench.registry.address, &faults.address);
    let by_digest = format!("{repository}@{instance}");
    let manifest = inspect(&by_digest);
    let digest = |value: &Value| value["digest"].as_str().unwrap().to_owned();
    let mut places = vec![
        ("a manifest asked for by digest".to_owned(), through(&by_digest), format!("/manifests/{instance}")),
        ("a manifest that an index names".to_owned(), through(&index), format!("/manifests/{instance}")),
        ("the config".to_owned(), through(&by_digest), format!("/blobs/{}", digest(&manifest["config"]))),
    ];
    for (at, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        places.push((format!("layer {at}"), through(&by_digest), format!("/blobs/{}", digest(layer))));
    }
    for (number, (what, spec, path)) in places.iter().enumerate() {
        faults.plan(path, Fault::Corrupt, 50);
        let store = bench.store(&format!("altered{number}"), None);
        let told = failure(spec, &store).await;
        assert!(faults.hits.load(std::sync::atomic::Ordering::SeqCst) > 0, "{what}: it was not asked for");
        assert_eq!((told.kind, told.kind.class()), (Kind::BadDigest, Class::Permanent), "{what}: {told}");
    }
}

/// Of this layer nothing is wanted: all is read past. Its bytes are still those that the manifest names,
/// or the pull fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_which_nothing_is_kept_is_checked_too() {
    let bench = Bench::new();
    let new = image(&bench, 1, 1);
    let spec = bench.push(&new, "os:1");
    let manifest = inspect(&spec);
    let layers = manifest["layers"].as_array().unwrap();
    // The booted repo has the content of the largest layer, which is read first, and lacks that of others.
    let largest = layers[1..].iter().max_by_key(|layer| layer["size"].as_u64()).unwrap();
    let booted_repo = Repo::create(&bench.path("booted"));
    let tree = bench.path("part");
    std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
    run("cp", &["-a", bench.path("tree1/usr/bin/kubelet").to_str().unwrap(), tree.join("usr/bin").to_str().unwrap()]);
    let commit = booted_repo.commit(&tree, "part");
    let booted = BootedRepo { path: booted_repo.path.clone(), commit: commit.parse().ok() };
    let faults = Faults::before(&bench.registry.address);
    faults.plan(largest["digest"].as_str().unwrap(), Fault::Corrupt, 50);
    let store = bench.store("store", Some(&booted));
    let options = PullOptions { parallel: Some(1), ..PullOptions::default() };
    let spec = spec.replace(&bench.registry.address, &faults.address);
    let told = try_pull_with(&spec, &store, Some(&booted), options.clone()).await.unwrap_err();
    assert_eq!(told.kind, Kind::BadDigest, "{told}");
    assert!(told.message.contains(largest["digest"].as_str().unwrap()), "{told}");
    assert_eq!(store.resolve_ref().unwrap(), None);
    faults.plan("", Fault::Corrupt, 0);
    let pulled = try_pull_with(&spec, &store, Some(&booted), options).await.unwrap();
    let kubelet = booted.content_objects().unwrap();
    let stored: HashSet<_> = store.content_objects().unwrap();
    assert!(stored.is_disjoint(&kubelet) && pulled.layers_fetched > 0, "the layer's content is the booted repo's");
}

/// An image whose blobs are what its manifest says, and still not what they claim to be.
#[tokio::test(flavor = "multi_thread")]
async fn false_claims_are_found() {
    let bench = Bench::new();
    let good = image(&bench, 1, 1);
    for at in 0..good.layers.len() {
        let layout = bench.path("layout");
        good.write(&layout);
        // The config claims another diff id for one layer; manifest and index are made to match.
        let script = r#"
            set -e; cd "$1/blobs/sha256"
            add() { s=$(sha256sum <"$1" | cut -d' ' -f1); mv "$1" "$s"; echo "$s"; }
            manifest=$(jq -r '.manifests[0].digest' ../../index.json | cut -d: -f2)
            config=$(jq -r .config.digest "$manifest" | cut -d: -f2)
            jq -c --argjson at "$2" '.rootfs.diff_ids[$at] = "sha256:" + ("ab" * 32)
                | (if $at == (.rootfs.diff_ids | length) - 1 then .config.Labels["ostree.final-diffid"] = .rootfs.diff_ids[$at] else . end)' "$config" >c
            size=$(stat -c %s c); config=$(add c)
            jq -c --arg d "sha256:$config" --argjson s "$size" '.config.digest = $d | .config.size = $s' "$manifest" >m
            size=$(stat -c %s m); manifest=$(add m)
            jq -c --arg d "sha256:$manifest" --argjson s "$size" '.manifests[0].digest = $d | .manifests[0].size = $s' ../../index.json >i
            mv i ../../index.json"#;
        run("bash", &["-c", script, "bash", layout.to_str().unwrap(), &at.to_string()]);
        let spec = bench.registry.push(&layout, &format!("claims:{at}"));
        let told = failure(&spec, &bench.store(&format!("diff-id-{at}"), None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "layer {at}: {told}");
        assert!(told.message.contains("diff id") && told.advice.contains("built wrong"), "layer {at}: {told}");
    }
    // Metadata, like content (`flipped` in the tests of bad images), are checked against their own names.
    for (what, extension) in [("dirtree", ".dirtree"), ("dirmeta", ".dirmeta"), ("commit", ".commit")] {
        let mut spoiled = good.clone();
        let tar = &mut spoiled.layers[0].tar;
        let last = {
            let mut archive = tar::Archive::new(tar.as_slice());
            let entry = archive.entries().unwrap().map(Result::unwrap).find(|entry| {
                let path = entry.path_bytes();
                path.ends_with(extension.as_bytes()) && entry.size() > 0
            });
            let entry = entry.unwrap_or_else(|| panic!("no {what} with content"));
            entry.raw_file_position() + entry.size() - 1
        };
        tar[last as usize] ^= 1;
        let spec = bench.push(&spoiled, &format!("claims:{what}"));
        let told = failure(&spec, &bench.store(what, None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "{what}: {told}");
        assert!(told.message.contains("checksum") && told.advice.contains("built wrong"), "{what}: {told}");
    }
}

/// An exporter that reads attributes back in another order than the commit's author had them in names an object after
/// content that it does not have (libostree before 2024.9 put a label behind attributes that sort later).
#[tokio::test(flavor = "multi_thread")]
async fn a_badly_built_object_is_reported_with_its_path() {
    let bench = Bench::new();
    let mut spoilt = image(&bench, 1, 1);
    for layer in &mut spoilt.layers {
        let content = b"ping 1";
        if let Some(at) = layer.tar.windows(content.len()).position(|bytes| bytes == content) {
            layer.tar[at] ^= 1;
        }
    }
    let told = failure(&bench.push(&spoilt, "os:1"), &bench.store("store", None)).await;
    assert_eq!(told.kind, Kind::BadFormat, "{told}");
    for words in [".file has the checksum", "(/usr/bin/ping)", "built wrong"] {
        assert!(told.to_string().contains(words), "{words}: {told}");
    }
}
