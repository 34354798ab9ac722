//! Failures through real pulls: the reported errors, and the next attempt, which goes on where the last one was.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use node_store::image::{Class, ImageSettings, Kind, Source};
use node_store::import::{PulledImage, pull};
use node_store::store::{BootedRepo, NodeStore};
use tokio_util::sync::CancellationToken;

use super::derived::complete;
use super::faults::{Fault, Faults};
use super::fixture::{Image, listing, run};
use super::{Bench, Failure, fsck, image, settings};

async fn attempt(spec: &str, store: &NodeStore) -> Result<PulledImage, Failure> {
    attempt_within(None, spec, store).await
}

async fn attempt_within(idle_timeout: Option<Duration>, spec: &str, store: &NodeStore) -> Result<PulledImage, Failure> {
    // One layer at a time, so that it is known what came before the fault.
    let settings = ImageSettings { idle_timeout, ..settings() };
    let source = Source::open(&settings).await?;
    let image = source.resolve(&spec.parse()?).await?;
    let options = node_store::import::PullOptions { parallel: Some(1), ..complete() };
    pull(&source, &image, store, None, &options, Default::default(), &CancellationToken::new()).await
}

/// An image behind a proxy that injects faults.
pub(super) struct FaultyImage {
    pub(super) bench: Bench,
    pub(super) image: Image,
    pub(super) faults: Faults,
    pub(super) spec: String,
    /// Digests of the layers, in the manifest's order.
    pub(super) layers: Vec<String>,
}

impl FaultyImage {
    pub(super) fn new() -> Self {
        let bench = Bench::new();
        let image = image(&bench, 1, 1);
        let direct = bench.push(&image, "os:1");
        let faults = Faults::before(&bench.registry.address);
        let spec = direct.replace(&bench.registry.address, &faults.address);
        let layout = format!("oci:{}", bench.path("layout").display());
        let manifest: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
        let digest = |layer: &serde_json::Value| layer["digest"].as_str().unwrap().to_owned();
        let layers = manifest["layers"].as_array().unwrap().iter().map(digest).collect();
        Self { bench, image, faults, spec, layers }
    }

    /// Returns the smallest of the layers that are not the kernel's, which comes after the larger ones.
    fn late(&self) -> &str {
        &self.layers[1]
    }

    /// Pulls with a fault at `path`, then without it. The second attempt fetches no layer again.
    async fn meets(&self, name: &str, path: &str, fault: Fault, kind: Kind) {
        let store = self.bench.store(&name.replace(' ', "-"), None);
        // skopeo tries some things again by itself.
        self.faults.plan(path, fault, 50);
        self.faults.served();
        let start = Instant::now();
        let idle_timeout = (fault == Fault::Stall).then_some(Duration::from_secs(5));
        let told = attempt_within(idle_timeout, &self.spec, &store).await.unwrap_err();
        println!(
            "{name}: {:.1} s, {} hits: {:?}: {told}",
            start.elapsed().as_secs_f64(),
            self.faults.hits.load(Ordering::SeqCst),
            told.kind
        );
        // Whether a broken transfer shows as an early end or as an error is a race inside skopeo; that it
        // is worth another attempt is not. All other kinds are exact.
        let transient = matches!(kind, Kind::Network | Kind::Truncated);
        assert_eq!(told.kind.class() == Class::Transient, transient, "{name}: {:?} {told}", told.kind);
        assert!(transient || told.kind == kind, "{name}: {:?} {told}", told.kind);
        // skopeo itself waits as long as Retry-After says, and tries again some times.
        assert!(!name.ends_with("429") || self.faults.hits.load(Ordering::SeqCst) >= 2, "{name}");
        assert!(path != self.late() || told.message.contains(self.late()), "{name} names the layer: {told}");
        self.goes_on(name, path, &store).await;
    }

    /// Pulls without a fault after one at `path`. Fetches no layer again.
    async fn goes_on(&self, name: &str, path: &str, store: &NodeStore) {
        assert_eq!(store.resolve_ref().unwrap(), None);
        let before = self.faults.served();
        self.faults.plan("", Fault::Stall, 0);
        let start = Instant::now();
        let pulled = attempt(&self.spec, store).await.unwrap();
        println!("{name}: then {:.1} s", start.elapsed().as_secs_f64());
        let after = self.faults.served();
        for digest in &self.layers {
            let twice = before.iter().any(|served| served == digest) && after.iter().any(|served| served == digest);
            assert!(!twice, "{name}: {digest} was fetched again");
        }
        assert!(pulled.complete && (path != self.late() || pulled.layers_fetched <= 2), "{name}: {pulled:?}");
        assert_eq!(
            listing(store.repo_path(), "coreos/node-image"),
            listing(&self.bench.repo.path, &self.image.commit),
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_layers_are_told_apart_and_the_next_attempt_goes_on() {
    let pull = FaultyImage::new();
    let late = pull.late();
    for (name, path, fault, kind) in [
        ("stall", late, Fault::Stall, Kind::Network),
        // skopeo mostly says of a reset only that the blob ended.
        ("reset", late, Fault::Reset, Kind::Truncated),
        ("cut", late, Fault::Cut, Kind::Truncated),
        ("corrupt", late, Fault::Corrupt, Kind::BadDigest),
        ("401", late, Fault::Answer(401, ""), Kind::Unauthorized),
        ("403", late, Fault::Answer(403, ""), Kind::Unauthorized),
        ("404", late, Fault::Answer(404, ""), Kind::NotFound),
        ("429", late, Fault::Answer(429, "Retry-After: 1\r\n"), Kind::Network),
        ("500", late, Fault::Answer(500, ""), Kind::Network),
        ("503", late, Fault::Answer(503, ""), Kind::Network),
    ] {
        pull.meets(name, path, fault, kind).await;
    }
}

/// The kernel may end skopeo when memory is short. Another attempt may pass.
#[tokio::test(flavor = "multi_thread")]
async fn a_skopeo_that_is_killed_in_a_layer_is_started_again() {
    let pull = FaultyImage::new();
    let store = pull.bench.store("killed", None);
    pull.faults.plan(pull.late(), Fault::Stall, 1);
    pull.faults.served();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "failing::child_attempt", "--nocapture"])
        .env("PIVOT_CHILD", format!("{} {}", pull.spec, store.root().display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    while pull.faults.hits.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let skopeos = skopeos_of(child.id());
    assert!(!skopeos.is_empty());
    skopeos.iter().for_each(|process| drop(run("kill", &["-KILL", process])));
    let told = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    println!("{told}");
    assert!(told.contains("may pass: true") && told.contains(pull.late()), "{told}");
    pull.goes_on("killed", pull.late(), &store).await;
}

/// Returns the processes of skopeo that the process `parent` has started.
fn skopeos_of(parent: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{parent}/task")).unwrap().flatten();
    let children = threads.map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    let children: Vec<_> =
        children.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect();
    let is_skopeo =
        |pid: &String| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "skopeo");
    children.into_iter().filter(is_skopeo).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of a_skopeo_that_is_killed_in_a_layer_is_started_again"]
async fn child_attempt() {
    let Ok(arguments) = std::env::var("PIVOT_CHILD") else { return };
    let (spec, root) = arguments.split_once(' ').unwrap();
    let told = attempt(spec, &NodeStore::open(root.as_ref()).unwrap()).await.unwrap_err();
    println!("may pass: {}: {told}", told.class.may_pass());
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_manifests_are_told_apart_and_the_next_attempt_goes_on() {
    let pull = FaultyImage::new();
    for (name, path, fault, kind) in [
        ("manifest 404", "/manifests/", Fault::Answer(404, ""), Kind::NotFound),
        ("manifest 429", "/manifests/", Fault::Answer(429, "Retry-After: 1\r\n"), Kind::Network),
        ("manifest 503", "/manifests/", Fault::Answer(503, ""), Kind::Network),
        ("manifest cut", "/manifests/", Fault::Cut, Kind::Truncated),
    ] {
        pull.meets(name, path, fault, kind).await;
    }
}

/// A small tmpfs.
pub(super) struct Small(pub(super) String);

impl Small {
    pub(super) fn mount(bench: &Bench, name: &str, size: &str) -> Self {
        let root = bench.path(name);
        fs::create_dir_all(&root).unwrap();
        let root = root.to_str().unwrap().to_owned();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", &root]);
        Self(root)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A commit that says how large its objects are, as `ostree commit --generate-sizes` makes it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_fit_is_refused_before_it_is_fetched() {
    let bench = Bench::new();
    let archive = bench.path("archive");
    let (tree, archive) = (bench.path("tree1"), archive.to_str().unwrap());
    super::tree(&tree, 1);
    run("ostree", &["init", "--mode=archive", "--repo", archive]);
    let tree = format!("--tree=dir={}", tree.display());
    let commit = run("ostree", &["commit", "--repo", archive, "--generate-sizes", "-b", "v1", "-s", "v1", &tree]);
    run("ostree", &["pull-local", "--repo", bench.repo.path.to_str().unwrap(), archive, "v1"]);
    let image = super::encapsulate(&bench.repo, commit.trim(), &super::chunker, 1);
    let direct = bench.push(&image, "os:1");
    let faults = Faults::before(&bench.registry.address);
    let spec = direct.replace(&bench.registry.address, &faults.address);

    let small = Small::mount(&bench, "small", "3m");
    let store = NodeStore::on_tmpfs(small.0.as_ref(), None).unwrap();
    faults.served();
    let told = attempt(&spec, &store).await.unwrap_err();
    println!("{told}");
    assert_eq!(told.kind, Kind::NoSpace, "{told}");
    for words in ["that this machine lacks; none was fetched", "of 3 MiB are free", "objects of 3.", "more memory"] {
        assert!(told.to_string().contains(words), "{words}: {told}");
    }
    let layout = format!("oci:{}", bench.path("layout").display());
    let manifest: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
    let layers: Vec<&str> =
        manifest["layers"].as_array().unwrap().iter().map(|l| l["digest"].as_str().unwrap()).collect();
    let served = faults.served();
    let fetched: Vec<_> = layers.iter().filter(|layer| served.iter().any(|served| served == *layer)).collect();
    assert_eq!(fetched, [&layers[0]], "no more than the commit's own layer");

    // Whatever the image's size: where the booted system has the objects, there is room.
    let empty = Small::mount(&bench, "small-booted", "3m");
    let booted = BootedRepo { path: bench.repo.path.clone(), commit: None };
    let store = NodeStore::on_tmpfs(empty.0.as_ref(), Some(&booted)).unwrap();
    let pulled = super::try_pull(&direct, &store, Some(&booted)).await.unwrap();
    assert!(pulled.complete && pulled.objects_written == 0, "{pulled:?}");
    // With more room it goes on.
    run("mount", &["-o", "remount,size=64m", &small.0]);
    assert!(attempt(&spec, &NodeStore::open(small.0.as_ref()).unwrap()).await.unwrap().complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_reported_with_numbers() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let spec = bench.push(&image, "os:1");
    let small = Small::mount(&bench, "small", "3m");
    let root_path = small.0.as_str();
    let store = NodeStore::on_tmpfs(root_path.as_ref(), None).unwrap();
    let told = attempt(&spec, &store).await.unwrap_err();
    println!("{told}");
    assert_eq!(told.kind, Kind::NoSpace, "{told}");
    assert_eq!(told.kind.class(), Class::Permanent);
    for words in ["of 3 MiB are free", "objects of about", "are still to come", "object ", root_path, "more memory"] {
        assert!(told.to_string().contains(words), "{words}: {told}");
    }
    // With more room it goes on; what was stored stayed good.
    run("mount", &["-o", "remount,size=64m", root_path]);
    let pulled = attempt(&spec, &store).await.unwrap();
    assert!(pulled.complete && pulled.layers_fetched < 5, "{pulled:?}");
    fsck(store.repo_path());
}
