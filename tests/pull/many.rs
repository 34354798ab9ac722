//! Images of hundreds of layers: bounded descriptors, processes and memory, and a resume by layer.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use node_store::store::NodeStore;

use super::derived::complete;
use super::faults::Faults;
use super::fixture::{Compress, Image, RawLayer, append, encapsulate, fsck, listing, run};
use super::layers::layer;
use super::measure::peak_rss_mib;
use super::plain::{labelled_system, plain};
use super::{Bench, try_pull_with};

const LAYERS: usize = 500;

/// A layer for one package with so many files.
fn package(at: usize, files: usize) -> RawLayer {
    let mut tar = tar::Builder::new(Vec::new());
    for file in 0..files {
        let path = format!("usr/lib/package-{at:03}/{}/file-{file:04}", file / 100);
        append(&mut tar, &path, format!("file {file} of package {at}").as_bytes());
    }
    RawLayer { tar: tar.into_inner().unwrap(), components: None, compress: Compress::Gzip }
}

/// A plain image with so many layers, of which each has the number of files that `files` returns.
fn plain_image(layers: usize, files: &dyn Fn(usize) -> usize) -> Image {
    let packages = (1..layers).map(|at| package(at, files(at)));
    plain([layer(&labelled_system())].into_iter().chain(packages).collect())
}

/// An encapsulated commit with one layer for each package.
fn encapsulated_image(bench: &Bench, layers: usize, files: &dyn Fn(usize) -> usize) -> Image {
    let dir = bench.path("packages");
    for at in 1..layers {
        for file in 0..files(at) {
            let path = dir.join(format!("usr/lib/package-{at:03}/{}/file-{file:04}", file / 100));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("file {file} of package {at}")).unwrap();
        }
    }
    let config = fs::OpenOptions::new().append(true).open(bench.repo.path.join("config")).unwrap();
    std::io::Write::write_all(&mut { config }, b"fsync=false\n").unwrap();
    let commit = bench.repo.commit(&dir, "packages");
    let names: BTreeMap<String, &'static str> = (1..layers)
        .map(|at| format!("package-{at:03}"))
        .map(|name| (name.clone(), &*Box::leak(name.into_boxed_str())))
        .collect();
    encapsulate(&bench.repo, &commit, &move |path| names.get(path.split('/').nth(2)?).copied(), 1)
}

/// Largest numbers that were seen while a process ran.
#[derive(Debug, Default)]
struct Most {
    descriptors: usize,
    processes: usize,
    descriptors_of_skopeo: usize,
    memory_of_skopeo_mib: u64,
}

impl Most {
    /// Looks at a process and its children once.
    fn look(&mut self, pid: u32) {
        let descriptors = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let children: Vec<u32> = tasks
            .flat_map(|task| fs::read_to_string(task.path().join("children")))
            .flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>())
            .collect();
        self.descriptors = self.descriptors.max(descriptors(pid));
        self.processes = self.processes.max(children.len());
        let of_one = children.iter().map(|child| descriptors(*child)).max();
        self.descriptors_of_skopeo = self.descriptors_of_skopeo.max(of_one.unwrap_or_default());
        let memory: u64 = children.iter().map(|child| rss_mib(*child)).sum();
        self.memory_of_skopeo_mib = self.memory_of_skopeo_mib.max(memory);
    }
}

fn rss_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or_default() / 1024
}

/// Starts a process that pulls the image into the store.
fn child(spec: &str, store: &NodeStore) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "many::child_pull", "--nocapture"])
        .env("PIVOT_CHILD", format!("{spec} {}", store.root().display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of the other tests"]
async fn child_pull() {
    let Ok(arguments) = std::env::var("PIVOT_CHILD") else { return };
    let (spec, root) = arguments.split_once(' ').unwrap();
    let start = Instant::now();
    let pulled = try_pull_with(spec, &NodeStore::open(Path::new(root)).unwrap(), None, complete()).await.unwrap();
    println!("peak: {} MiB, {:.1} s, {pulled:?}", peak_rss_mib(), start.elapsed().as_secs_f64());
}

/// Digests of the layers of an OCI layout.
fn layers_of(layout: &Path) -> HashSet<String> {
    let manifest = run("skopeo", &["inspect", "--raw", &format!("oci:{}", layout.display())]);
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let digest = |layer: &serde_json::Value| layer["digest"].as_str().unwrap().to_owned();
    manifest["layers"].as_array().unwrap().iter().map(digest).collect()
}

/// Pulls until `enough` returns true, or to the end. Returns the largest numbers and the output.
fn watched(mut child: Child, enough: impl Fn() -> bool) -> (Most, String) {
    let mut most = Most::default();
    while child.try_wait().unwrap().is_none() && !enough() {
        most.look(child.id());
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    (most, String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn hundreds_of_layers_need_few_resources_and_are_resumed_by_layer() {
    let bench = Bench::new();
    let files = |at: usize| if at % 200 == 1 { 2000 } else { 1 + at % 3 };
    let layout = bench.path("layout");
    plain_image(LAYERS, &files).write(&layout);
    let layers = layers_of(&layout);
    let faults = Faults::before(&bench.registry.address);
    let spec = bench.registry.place(&layout, "many").replace(&bench.registry.address, &faults.address);
    let store = bench.store("store", None);
    let fetched = |faults: &Faults| {
        let mut fetched = faults.served();
        fetched.retain(|digest| layers.contains(digest));
        fetched
    };

    let lists = store.root().join("derived");
    let imported = || fs::read_dir(&lists).map_or(0, Iterator::count);
    let (first, _) = watched(child(&spec, &store), || imported() >= LAYERS / 3);
    // A name of a list that was being written does not count.
    let whole = fs::read_dir(&lists).unwrap().filter(|entry| entry.as_ref().unwrap().path().extension().is_none());
    let whole = whole.count();
    println!("killed after {whole} of {} layers: {first:?}", layers.len());
    assert!(whole < LAYERS && fetched(&faults).len() >= whole);

    // The skopeo of the killed run may still read a layer from the first proxy.
    let proxy = Faults::before(&bench.registry.address);
    let (second, output) = watched(child(&spec.replace(&faults.address, &proxy.address), &store), || false);
    let again = fetched(&proxy);
    let line = output.lines().find(|line| line.starts_with("peak: ")).unwrap_or_else(|| panic!("{output}"));
    println!("{} layers fetched by the second run: {second:?}, {}", again.len(), &line[..30]);
    assert_eq!(again.len(), LAYERS - whole, "no layer twice");
    assert!(line.contains(&format!("layers_fetched: {}, layers_skipped: {whole}", again.len())), "{line}");
    assert!(line.contains("complete: true") && line.contains("warnings: []"), "{line}");
    let peak: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(peak <= 150, "{line}");
    for most in [first, second] {
        // Four readers at most, on a machine with many CPUs, and `skopeo --version`.
        assert!(most.processes <= 5 && most.descriptors <= 60 && most.descriptors_of_skopeo <= 60, "{most:?}");
    }
    fsck(store.repo_path());
    let all = listing(store.repo_path(), "coreos/node-image");
    assert_eq!(all.matches("/file-").count(), (1..LAYERS).map(files).sum::<usize>());
}

/// Not a test but a measurement of images with up to `PIVOT_FILES` files in a layer:
/// `PIVOT_FILES=2000 cargo test --release --test pull -- --ignored --nocapture measure_many`. Few layers have many files,
/// as in images with one layer for each package, unless `PIVOT_UNIFORM` is set.
#[test]
#[ignore = "prints numbers"]
fn measure_many() {
    let layers = LAYERS;
    let most: usize = std::env::var("PIVOT_FILES").map_or(20, |text| text.parse().unwrap());
    let uniform = std::env::var("PIVOT_UNIFORM").is_ok();
    let files = |at: usize| {
        let share = (at * 7919 % 500) as f64 / 499.0;
        if uniform { 1 + (share * (most - 1) as f64) as usize } else { (most as f64).powf(share) as usize }
    };
    println!("{} files", (1..layers).map(files).sum::<usize>());
    for kind in std::env::var("PIVOT_KIND").unwrap_or("plain encapsulated".into()).split(' ') {
        let bench = Bench::new();
        let start = Instant::now();
        let image = match kind {
            "plain" => plain_image(layers, &files),
            _ => encapsulated_image(&bench, layers, &files),
        };
        println!("made in {:.1} s", start.elapsed().as_secs_f64());
        let start = Instant::now();
        let layout = bench.path("layout");
        image.write(&layout);
        let spec = bench.registry.place(&layout, "many");
        drop(image);
        println!("pushed in {:.1} s", start.elapsed().as_secs_f64());
        let store = bench.store("store", None);
        let (most, output) = watched(child(&spec, &store), || false);
        let line = output.lines().find(|line| line.starts_with("peak: ")).unwrap_or_default();
        println!("{kind}: {most:?} {line}");
    }
}
