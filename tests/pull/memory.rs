//! The cap on memory: 150 MiB resident at most, however large the image is.
//!
//! The sizes here keep the test quick. 1 GiB and 10 000 files, encapsulated, took 36 MiB; 512 MiB and 100 000
//! files in a plain layer on an unlabelled base took 110 MiB.

use std::fs;
use std::path::Path;
use std::time::Instant;

use node_store::store::NodeStore;
use tar::EntryType;

use super::derived::{complete, policy};
use super::fixture::{Compress, Image, RawLayer, encapsulate};
use super::measure::peak_rss_mib;
use super::{Bench, try_pull_with};

/// MiB; stated in `src/import/mod.rs`.
const CAP: u64 = 150;
/// MiB by which a large image may cost more than a small one: what is known of each object (its name, in the
/// wanted set and the tree) is kept, its content is not.
const GROWTH: u64 = 32;

/// Returns the layer of a path's content.
fn chunks(path: &str) -> Option<&'static str> {
    match path {
        path if path.ends_with("/large-0") => Some("large-0"),
        path if path.ends_with("/large-1") => Some("large-1"),
        path if path.ends_with("/large-2") => Some("large-2"),
        path if path.ends_with("/large-3") => Some("large-3"),
        path if path.starts_with("usr/share/many") => Some("many"),
        _ => None,
    }
}

/// A commit with four large files, `mib` altogether, and `small` small ones; well compressible. With a policy and
/// no labels, an import of plain layers on top writes all of it again.
fn encapsulated(bench: &Bench, mib: u64, small: usize, unlabelled: bool) -> Image {
    let dir = bench.path("tree");
    fs::create_dir_all(dir.join("usr/share/many")).unwrap();
    for at in 0..4_u8 {
        let file = fs::File::create(dir.join(format!("usr/share/large-{at}"))).unwrap();
        // Holes; one byte makes each another object.
        std::os::unix::fs::FileExt::write_at(&file, &[at + 1], 0).unwrap();
        file.set_len(mib * (1 << 20) / 4).unwrap();
    }
    for at in 0..small {
        fs::write(dir.join(format!("usr/share/many/file-{at}")), format!("content {at}")).unwrap();
    }
    if unlabelled {
        policy(&dir, "/.*\tsystem_u:object_r:default_t:s0\n/usr(/.*)?\tsystem_u:object_r:usr_t:s0\n");
    }
    let commit = bench.repo.commit(&dir, "large");
    fs::remove_dir_all(&dir).unwrap();
    let mut image = encapsulate(&bench.repo, &commit, &chunks, 1);
    for layer in &mut image.layers {
        layer.compress = Compress::Zstd;
    }
    image
}

/// A plain layer of one large file and `small` small ones.
fn plain(mib: u64, small: usize) -> RawLayer {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |path: &str, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content).unwrap();
    };
    add("usr/share/plain-large", &vec![7; (mib << 20) as usize]);
    for at in 0..small {
        add(&format!("usr/share/plain/{}/file-{at}", at % 100), format!("plain {at}").as_bytes());
    }
    RawLayer { tar: tar.into_inner().unwrap(), components: None, compress: Compress::Zstd }
}

/// MiB resident at most while a child pulls the image.
fn pull(what: &str, image: Image, bench: &Bench) -> u64 {
    let spec = bench.push(&image, "large:1");
    drop(image);
    let start = Instant::now();
    let store = bench.store("store", None);
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "memory::child_pull", "--nocapture"])
        .env("PIVOT_CHILD", format!("{spec} {}", store.root().display()))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let peak = told.lines().find_map(|line| line.split_once("peak: "));
    let (_, peak) = peak.unwrap_or_else(|| panic!("{what}: {told}{}", String::from_utf8_lossy(&output.stderr)));
    println!("{what}: {peak} MiB resident at most, {:.1} s", start.elapsed().as_secs_f64());
    peak.trim().parse().unwrap()
}

#[test]
fn resident_memory_does_not_grow_with_the_image() {
    let mut peaks = Vec::new();
    for (what, mib, small) in [("small", 64, 100), ("large", 512, 5_000)] {
        let bench = Bench::new();
        let image = encapsulated(&bench, mib, small, false);
        peaks.push(pull(&format!("encapsulated, {what}: {mib} MiB, {small} small files"), image, &bench));
    }
    for (what, mib, small) in [("small", 64, 100), ("large", 256, 20_000)] {
        let bench = Bench::new();
        let mut image = encapsulated(&bench, mib / 2, 100, true);
        image.layers.push(plain(mib / 2, small));
        peaks.push(pull(&format!("derived and relabelled, {what}: {mib} MiB, {small} small files"), image, &bench));
    }
    assert!(peaks.iter().all(|peak| *peak <= CAP), "{peaks:?} MiB, at most {CAP}");
    assert!(peaks[1] <= peaks[0] + GROWTH && peaks[3] <= peaks[2] + GROWTH, "{peaks:?} MiB");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of resident_memory_does_not_grow_with_the_image"]
async fn child_pull() {
    let Ok(arguments) = std::env::var("PIVOT_CHILD") else { return };
    let (spec, root) = arguments.split_once(' ').unwrap();
    let pulled = try_pull_with(spec, &NodeStore::open(Path::new(root)).unwrap(), None, complete()).await.unwrap();
    assert!(pulled.complete);
    println!("peak: {}", peak_rss_mib());
}
