//! Pulls from a real registry, through skopeo, into a real ostree repo.
//!
//! Runs as root (owners, trusted attributes), as the agent does.
#![allow(clippy::unwrap_used, missing_docs)]

mod booted;
mod completing;
mod contended;
mod deploying;
mod derived;
mod disk;
mod failing;
mod faults;
mod fixture;
mod held;
mod hostile;
mod image_refs;
mod indexes;
mod integrity;
mod killed;
mod layers;
mod local;
mod many;
mod measure;
mod media;
mod memory;
mod modules;
mod names;
mod odd_layers;
mod oracle;
mod own_sysroot;
#[allow(dead_code)]
#[path = "../harness/src/page.rs"]
mod page;
mod plain;
mod policy;
mod ref_cuts;
mod refs;
mod registry;
mod relabelled;
mod release;
mod shapes;
mod signed;
mod sparse;
mod stalled;
mod tree;
mod undeployable;
mod unpacked;
mod waits;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fixture::{Compress, Image, Repo, encapsulate, fsck, listing, run};
use node_store::PullProgress;
use node_store::image::{Failure, ImageSettings, Kind, PullSpec, Source};
use node_store::import::{PullOptions, PulledImage, pull};
use node_store::store::{BootedRepo, NodeStore, ObjectType};
use registry::{Registry, always, free_address};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tree::{chunker, noise, tree};

fn settings() -> ImageSettings {
    ImageSettings { insecure: true, ..ImageSettings::default() }
}

/// A registry, a repo with a tree, and places for stores.
struct Bench {
    temp: TempDir,
    registry: Registry,
    repo: Repo,
}

impl Bench {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let registry = Registry::start(temp.path(), None);
        let repo = Repo::create(&temp.path().join("source"));
        Self { temp, registry, repo }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn push(&self, image: &Image, name: &str) -> String {
        let layout = self.path("layout");
        image.write(&layout);
        self.registry.push(&layout, name)
    }

    fn store(&self, name: &str, booted: Option<&BootedRepo>) -> NodeStore {
        let root = self.path(name);
        fs::create_dir_all(&root).unwrap();
        NodeStore::on_tmpfs(&root, booted).unwrap()
    }
}

fn image(bench: &Bench, version: u8, format: u8) -> Image {
    let dir = bench.path(&format!("tree{version}"));
    if !dir.exists() {
        tree(&dir, version);
    }
    let commit = bench.repo.commit(&dir, &format!("v{version}"));
    encapsulate(&bench.repo, &commit, &chunker, format)
}

async fn try_pull_with(
    spec: &str,
    store: &NodeStore,
    booted: Option<&BootedRepo>,
    options: PullOptions,
) -> Result<PulledImage, Failure> {
    let source = Source::open(&settings()).await?;
    let image = source.resolve(&spec.parse::<PullSpec>()?).await?;
    let progress = Arc::new(PullProgress::default());
    let pulled = pull(&source, &image, store, booted, &options, progress.clone(), &CancellationToken::new()).await?;
    let shown = progress.snapshot();
    assert!(shown.layers_done == shown.layers_total && shown.objects_done <= shown.objects_wanted, "{shown:?}");
    assert_eq!(shown.bytes_total, shown.bytes_fetched, "in the end nothing more is expected");
    Ok(pulled)
}

async fn try_pull(spec: &str, store: &NodeStore, booted: Option<&BootedRepo>) -> Result<PulledImage, Failure> {
    try_pull_with(spec, store, booted, PullOptions::default()).await
}

async fn failure(spec: &str, store: &NodeStore) -> Failure {
    let complete = PullOptions { complete: true, ..PullOptions::default() };
    let failure = try_pull_with(spec, store, None, complete).await.unwrap_err();
    println!("{:?}: {failure}", failure.kind);
    assert_eq!(store.resolve_ref().unwrap(), None, "a failed pull leaves no ref");
    failure
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_import_is_the_tree_that_was_encapsulated() {
    let bench = Bench::new();
    for format in [2, 1, 0] {
        let image = image(&bench, 1, format);
        let spec = bench.push(&image, &format!("os:f{format}"));
        let store = bench.store(&format!("store{format}"), None);
        let options = PullOptions { complete: true, ..PullOptions::default() };
        let pulled = try_pull_with(&spec, &store, None, options.clone()).await.unwrap();
        assert!(pulled.complete && pulled.commit == image.id());
        assert_eq!((pulled.layers_fetched, pulled.layers_skipped), (5, 0));
        fsck(store.repo_path());
        assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &image.commit));
        let (repo, out) = (format!("--repo={}", store.repo_path().display()), bench.path(&format!("out{format}")));
        run("ostree", &["checkout", &repo, "coreos/node-image", out.to_str().unwrap()]);
        assert_eq!(fs::read(out.join("usr/bin/kubelet")).unwrap(), noise(2_000_000, 1));
        let again = try_pull_with(&spec, &store, None, options).await.unwrap();
        assert_eq!(again, pulled, "pulled before: the record is the answer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_booted_system_lacks_is_stored() {
    let bench = Bench::new();
    let old = image(&bench, 1, 1);
    let new = image(&bench, 2, 1);
    // The booted repo has the old commit and nothing of the new one.
    let booted_repo = Repo::create(&bench.path("booted"));
    run(
        "ostree",
        &["pull-local", "--repo", booted_repo.path.to_str().unwrap(), bench.repo.path.to_str().unwrap(), &old.commit],
    );
    let booted = BootedRepo { path: booted_repo.path.clone(), commit: Some(old.id()) };
    let spec = bench.push(&new, "os:2");
    let store = bench.store("store", Some(&booted));
    let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
    // kubelet, ping, app.conf, only-in-2: what changed, without the kernel's two files.
    assert_eq!(pulled.objects_written, 4);
    assert!(!pulled.complete);
    assert!(pulled.layers_fetched <= 4, "the kernel layer is not fetched: {pulled:?}");
    assert_eq!(store.content_objects().unwrap().len(), 4);
    let expected = listing(&bench.repo.path, &new.commit);
    assert_eq!(
        expected.lines().count(),
        run("ostree", &["ls", "-R", "--nul-filenames-only", "--repo", bench.repo.path.to_str().unwrap(), &new.commit])
            .split_terminator('\0')
            .count()
    );
    let dirs = ["ls", "-d", "--repo", store.repo_path().to_str().unwrap(), "coreos/node-image", "/usr/lib/modules/6.1"];
    run("ostree", &dirs);
    // Later, for a deployment: the rest, without fetching anything twice.
    let complete = PullOptions { complete: true, ..PullOptions::default() };
    let pulled = try_pull_with(&spec, &store, Some(&booted), complete).await.unwrap();
    assert!(pulled.complete);
    assert_eq!(pulled.objects_written, 2);
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), expected);
    let (repo, out) = (format!("--repo={}", store.repo_path().display()), bench.path("out"));
    run("ostree", &["checkout", "-U", "--force-copy", &repo, "coreos/node-image", out.to_str().unwrap()]);
    // The same commit as booted: nothing to fetch at all.
    let same = bench.push(&old, "os:1");
    let store = bench.store("same", Some(&booted));
    let pulled = try_pull(&same, &store, Some(&booted)).await.unwrap();
    assert_eq!((pulled.layers_fetched, pulled.bytes_fetched, pulled.complete), (0, 0, true));
    run("ostree", &["ls", "-R", "--repo", store.repo_path().to_str().unwrap(), "coreos/node-image"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_registry_is_reported_and_the_pull_resumed() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let layout = bench.path("layout");
    let spec = bench.push(&image, "os:1");
    let manifest: serde_json::Value =
        serde_json::from_str(&run("skopeo", &["inspect", "--raw", &format!("oci:{}", layout.display())])).unwrap();
    let layers: Vec<&str> =
        manifest["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
    for digest in &layers {
        let file = bench.registry.blob(digest);
        let good = fs::read(&file).unwrap();
        let mut corrupt = good.clone();
        let middle = corrupt.len() / 2;
        corrupt[middle] ^= 0xff;
        for (spoiled, kind) in [(&corrupt[..], Kind::BadDigest), (&good[..middle], Kind::Truncated)] {
            fs::write(&file, spoiled).unwrap();
            let told = failure(&spec, &bench.store(&format!("{digest}-{kind:?}"), None)).await;
            assert_eq!(told.kind, kind, "{told}");
            assert!(told.message.contains(digest), "{}", told.message);
        }
        fs::write(&file, &good).unwrap();
    }
    // The layer of the tools is the smallest and comes after all others but the kernel's.
    let file = bench.registry.blob(layers[1]);
    let good = fs::read(&file).unwrap();
    fs::write(&file, b"gone").unwrap();
    let store = bench.store("store", None);
    // One at a time, so that it is known what came before.
    let one = PullOptions { complete: true, parallel: Some(1), ..PullOptions::default() };
    try_pull_with(&spec, &store, None, one.clone()).await.unwrap_err();
    fs::write(&file, &good).unwrap();
    let pulled = try_pull_with(&spec, &store, None, one).await.unwrap();
    assert!(pulled.layers_fetched <= 3 && pulled.bytes_fetched < 1_000_000, "goes on where it was: {pulled:?}");
    fsck(store.repo_path());
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &image.commit));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_are_refused_before_they_are_used() {
    let bench = Bench::new();
    type Spoil = fn(&mut Image);
    let cases: BTreeMap<&str, (Spoil, Kind, &str)> = BTreeMap::from([
        ("arch", ((|image| image.architecture = "m68k".into()) as Spoil, Kind::WrongArchitecture, "m68k")),
        ("unlabelled", (|image| image.labels.clear(), Kind::BadFormat, "is not an operating system")),
        (
            "short",
            (
                |image| {
                    image.layers.remove(2);
                    image.final_layer -= 1;
                },
                Kind::BadFormat,
                "is incomplete",
            ),
        ),
        (
            "label",
            (
                |image| {
                    image.labels.insert("ostree.commit".into(), "ab".repeat(32));
                },
                Kind::BadFormat,
                "label names commit",
            ),
        ),
        (
            "flipped",
            (
                |image| {
                    let tar = &mut image.layers[1].tar;
                    let at = tar.windows(4).position(|four| four == b"bbbb").unwrap();
                    tar[at] ^= 1;
                },
                Kind::BadFormat,
                "has the checksum",
            ),
        ),
        ("garbage", (|image| image.layers[1].tar = vec![7; 2048], Kind::BadFormat, "malformed")),
        (
            "ends",
            (
                |image| {
                    let tar = &mut image.layers[1].tar;
                    tar.truncate(tar.len() - 1024 - 700);
                },
                Kind::BadFormat,
                "ends early",
            ),
        ),
    ]);
    for (name, (spoil, kind, words)) in cases {
        let mut image = image(&bench, 1, 1);
        spoil(&mut image);
        let spec = bench.push(&image, &format!("bad:{name}"));
        let told = failure(&spec, &bench.store(name, None)).await;
        assert_eq!(told.kind, kind, "{name}: {told}");
        assert!(told.message.contains(words) && told.message.contains("/bad@sha256:"), "{name}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_outside_of_the_tree_are_refused() {
    let bench = Bench::new();
    let layer = |image: &mut Image, path: &str, kind: tar::EntryType, link: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(0);
        // The tar crate refuses to write such paths; an attacker would not.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_link_name_literal(link).unwrap();
        header.set_cksum();
        tar.append(&header, std::io::empty()).unwrap();
        let spoiled = tar.into_inner().unwrap();
        image.layers[1].tar = [&spoiled[..512], &image.layers[1].tar].concat();
    };
    for (name, path, kind, link) in [
        ("dotdot", "usr/../../etc/passwd", tar::EntryType::Regular, ""),
        ("absolute", "/etc/passwd", tar::EntryType::Regular, ""),
        ("outlink", "usr/x", tar::EntryType::Link, "../etc/passwd"),
    ] {
        let mut image = image(&bench, 1, 1);
        layer(&mut image, path, kind, link);
        let spec = bench.push(&image, &format!("bad:{name}"));
        let told = failure(&spec, &bench.store(name, None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "{name}: {told}");
        assert!(told.message.contains("escapes"), "{name}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_that_refuse_or_fail() {
    let bench = Bench::new();
    let store = bench.store("store", None);
    let spec = bench.push(&image(&bench, 1, 1), "os:1");
    let repository = spec.strip_suffix(":1").unwrap();
    let guarded_dir = tempfile::tempdir().unwrap();
    let guarded = Registry::start(guarded_dir.path(), Some("user:secret"));
    let closed = free_address();
    let unavailable = always("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let internal = always("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let forbidden = always("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let hangs_up = always("");
    for (spec, kind) in [
        (format!("{repository}:nosuch"), Kind::NotFound),
        (format!("{repository}@sha256:{}", "0".repeat(64)), Kind::NotFound),
        (format!("{}/nosuch:1", bench.registry.address), Kind::NotFound),
        (format!("{}/os:1", guarded.address), Kind::Unauthorized),
        (format!("{forbidden}/os:1"), Kind::Unauthorized),
        (format!("{closed}/os:1"), Kind::Network),
        ("registry.invalid/os:1".to_owned(), Kind::Network),
        (format!("{unavailable}/os:1"), Kind::Network),
        (format!("{internal}/os:1"), Kind::Network),
        (format!("{hangs_up}/os:1"), Kind::Network),
        ("os:1".to_owned(), Kind::BadPullSpec),
    ] {
        let told = failure(&spec, &store).await;
        assert_eq!(told.kind, kind, "{spec}: {told}");
    }
    // With the credentials it works.
    let layout = bench.path("layout");
    let spec = guarded.push(&layout, "os:1");
    let authfile = bench.path("auth.json");
    run(
        "skopeo",
        &[
            "login",
            "--tls-verify=false",
            "--authfile",
            authfile.to_str().unwrap(),
            "-u",
            "user",
            "-p",
            "secret",
            &guarded.address,
        ],
    );
    let source = Source::open(&ImageSettings { authfile: Some(authfile), ..settings() }).await.unwrap();
    source.resolve(&spec.parse().unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_several_architectures() {
    let bench = Bench::new();
    let own = image(&bench, 1, 1);
    let mut other = image(&bench, 2, 1);
    other.architecture = "s390x".into();
    let layout = bench.path("multi");
    let digest = own.write_with(&other, &layout);
    let spec = bench.registry.push(&layout, "multi:1");
    let store = bench.store("store", None);
    let pulled = try_pull(&spec, &store, None).await.unwrap();
    assert_eq!(pulled.commit, own.id());
    assert_eq!(pulled.image.digest.to_string(), digest, "pinned to this machine's manifest, not to the index");
    // From the persisted record, with a proxy that has never seen the tag.
    let source = Source::open(&settings()).await.unwrap();
    let (store, cancel) = (bench.store("again", None), CancellationToken::new());
    let again =
        pull(&source, &pulled.image, &store, None, &PullOptions::default(), Arc::default(), &cancel).await.unwrap();
    assert_eq!(again.commit, own.id());
}

/// Every compression is used by some layer of the fixture; this keeps it so.
#[test]
fn the_fixture_has_all_compressions() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    for compress in [Compress::Gzip, Compress::Zstd, Compress::None] {
        assert!(image.layers.iter().any(|layer| layer.compress == compress));
    }
}
