//! The cap on memory for plain layers of every shape: many small entries take more than their bytes.
//!
//! With the least limit of the lists, a pull ends well within the cap, or with a refusal that names the layer, the count and
//! the limit, within it, too.

use node_store::import::PullOptions;
use node_store::store::NodeStore;
use tar::EntryType;

use super::derived::{Labels, base, complete};
use super::fixture::{Compress, Image, RawLayer};
use super::measure::peak_rss_mib;
use super::plain::{labelled_system, of};
use super::{Bench, try_pull_with};

/// MiB; stated in `src/import/mod.rs`.
const CAP: u64 = 170;
/// The least limit of the lists, in MiB.
const LEAST: u64 = 80;

fn layer(paths: impl Iterator<Item = (String, String)>) -> RawLayer {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in paths {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    RawLayer { tar: tar.into_inner().unwrap(), components: None, compress: Compress::Zstd }
}

/// So many files in one directory, each with other content.
fn wide(count: usize) -> RawLayer {
    layer((0..count).map(|at| (format!("usr/share/wide/{at:06}"), format!("wide {at}"))))
}

/// So many files of one of several layers.
fn package(count: usize, number: usize) -> RawLayer {
    layer((0..count).map(|at| (format!("usr/lib/{number}/{}/{at:05}", at / 100), format!("{number} {at}"))))
}

/// So many directories with one empty file each.
fn deep(count: usize, tree: usize) -> RawLayer {
    layer((0..count).map(|at| (format!("usr/share/x{tree}/{at:06x}/f"), String::new())))
}

/// So many chains of 240 directories, with an empty file at the end of each: few bytes in a blob.
fn chains(count: usize) -> RawLayer {
    layer((0..count).map(|at| (format!("usr/share/{at:05x}/{}x", "d/".repeat(240)), String::new())))
}

#[test]
fn layers_of_any_shape_stay_within_the_cap() {
    let mut peaks = Vec::new();
    for (what, layers, fits) in [
        ("wide", vec![wide(100_000)], true),
        ("packages", (0..14).map(|number| package(10_000, number)).collect(), true),
        ("deep", vec![deep(75_000, 0)], true),
        ("deeper", vec![deep(100_000, 0)], false),
        ("chains", vec![chains(400)], true),
        ("endless chains", vec![chains(4_000)], false),
        ("many", (0..6).map(|tree| deep(100_000, tree)).collect(), false),
    ] {
        peaks.push((what, checked(what, derived, layers, fits)));
    }
    assert!(peaks.iter().all(|(_, peak)| *peak <= CAP), "{peaks:?} MiB, at most {CAP}");
}

#[test]
fn plain_images_of_any_shape_stay_within_the_cap() {
    let packages = (0..14).map(|number| package(10_000, number)).collect();
    for (what, layers, fits) in [("packages", packages, true), ("deeper", vec![deep(100_000, 0)], false)] {
        let peak = checked(what, |_| of(&[labelled_system()]), layers, fits);
        assert!(peak <= CAP, "{what}: {peak} MiB, at most {CAP}");
    }
}

fn derived(bench: &Bench) -> Image {
    base(bench, Labels::Own)
}

/// Pulls an image with these layers upon `bottom`, which fits into the least limit or not. Returns the peak of the resident
/// memory in MiB.
fn checked(what: &str, bottom: fn(&Bench) -> Image, layers: Vec<RawLayer>, fits: bool) -> u64 {
    let (spec, peak, refusal) = pulled_by_child(what, bottom, layers, LEAST);
    assert_eq!(refusal.is_none(), fits, "{what}: {refusal:?}");
    for words in [&spec[..10], "layer ", "(sha256:", "exceeds the limit", "entries", "80 MiB"] {
        assert!(refusal.iter().all(|refusal| refusal.contains(words)), "{what}: {refusal:?}");
    }
    peak
}

/// A machine with 4 GiB of memory has a limit of 256 MiB.
#[test]
fn more_memory_permits_more_files() {
    const LIMIT: u64 = 256;
    let layers = (0..40).map(|number| package(10_000, number)).collect();
    let (_, peak, refusal) = pulled_by_child("400,000 files", derived, layers, LIMIT);
    assert!(refusal.is_none() && peak <= CAP - LEAST + LIMIT, "{peak} MiB, {refusal:?}");
}

/// Pulls an image with these layers in another process, whose lists may use `limit` MiB. Returns the pull spec, the peak of
/// the resident memory in MiB, and the refusal.
fn pulled_by_child(
    what: &str,
    bottom: fn(&Bench) -> Image,
    layers: Vec<RawLayer>,
    limit: u64,
) -> (String, u64, Option<String>) {
    let bench = Bench::new();
    let mut image = bottom(&bench);
    image.layers.extend(layers);
    let spec = bench.push(&image, "shape:1");
    drop(image);
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "shapes::child_pull", "--nocapture"])
        .envs([("PIVOT_SHAPE", spec.as_str()), ("PIVOT_LIMIT", &limit.to_string())])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = |key: &str| told.lines().find_map(|line| line.split_once(key)).map(|(_, value)| value.to_owned());
    let peak: u64 = value("peak: ").unwrap_or_else(|| panic!("{what}: {told}")).trim().parse().unwrap();
    println!("{what}: {peak} MiB resident at most; {:?}", value("refused: "));
    (spec, peak, value("refused: "))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of other tests"]
async fn child_pull() {
    let (Ok(spec), Ok(limit)) = (std::env::var("PIVOT_SHAPE"), std::env::var("PIVOT_LIMIT")) else { return };
    let options = PullOptions { list_memory: Some(limit.parse::<usize>().unwrap() << 20), ..complete() };
    let root = tempfile::tempdir().unwrap();
    let store = NodeStore::on_tmpfs(root.path(), None).unwrap();
    match try_pull_with(&spec, &store, None, options).await {
        Ok(pulled) => assert!(pulled.complete),
        Err(failure) => {
            assert_eq!(store.resolve_ref().unwrap(), None, "a failed pull leaves no ref");
            println!("refused: {failure}");
        }
    }
    println!("peak: {}", peak_rss_mib());
}

/// A delta pull leaves the kernel module out. The list of the layer uses more than half of the limit.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_read_again_counts_once() {
    let bench = Bench::new();
    let mut image = base(&bench, Labels::Own);
    let module = ("usr/lib/modules/6.1/extra.ko".to_owned(), "module".to_owned());
    let removed = (0..85_000).map(|at| (format!("usr/share/.wh.{at:06}"), String::new()));
    image.layers.push(layer(removed.chain([module])));
    let spec = bench.push(&image, "shape:again");
    let store = bench.store("again", None);
    let options = |options: PullOptions| PullOptions { list_memory: Some((LEAST as usize) << 20), ..options };
    let partial = try_pull_with(&spec, &store, None, options(PullOptions::default())).await.unwrap();
    assert!(!partial.complete);
    assert!(try_pull_with(&spec, &store, None, options(complete())).await.unwrap().complete);
}
