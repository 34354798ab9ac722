//! `--complete`: the rest of an image, later, and nothing twice.

use std::fs;
use std::sync::atomic::Ordering;

use node_store::image::{Class, Kind};
use node_store::import::PullOptions;
use node_store::store::NodeStore;

use super::derived::complete;
use super::failing::FaultyImage;
use super::faults::Fault;
use super::fixture::{encapsulate, listing, run};
use super::image_refs::Counted;
use super::tree::{chunker, tree};
use super::{fsck, try_pull_with};

/// The content of a layer that was read is known.
#[tokio::test(flavor = "multi_thread")]
async fn layers_without_missing_objects_are_not_read_again() {
    let counted = Counted::new();
    let bench = &counted.bench;
    let path = bench.path("mixed");
    tree(&path, 1);
    let mixed = |path: &str| if path.ends_with("vmlinuz") { Some("bash") } else { chunker(path) };
    let commit = bench.repo.commit(&path, "mixed");
    let spec = counted.push(&encapsulate(&bench.repo, &commit, &mixed, 1), "mixed:1");
    let store = bench.store("store", None);
    assert!(!try_pull_with(&spec, &store, None, PullOptions::default()).await.unwrap().complete);
    let first = counted.served();
    assert!(try_pull_with(&spec, &store, None, complete()).await.unwrap().complete);
    let second = counted.served();
    assert_eq!((first.len(), second.len()), (4, 3), "the modules, the layer with the kernel, the first one");
    fsck(store.repo_path());
}

/// A tmpfs, unmounted when dropped.
struct Tmpfs(String);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rest_is_fetched_later_and_nothing_twice() {
    let FaultyImage { bench, image, faults, spec, mut layers } = FaultyImage::new();
    let tools = layers[1].clone();
    layers.sort();
    let fetched = || {
        let mut fetched = faults.served();
        fetched.retain(|digest| layers.contains(digest));
        fetched.sort();
        fetched
    };

    let root = bench.path("tmpfs");
    fs::create_dir_all(&root).unwrap();
    let tmpfs = Tmpfs(root.to_str().unwrap().to_owned());
    run("mount", &["-t", "tmpfs", "-o", "size=64m", "tmpfs", &tmpfs.0]);
    let store = NodeStore::on_tmpfs(&root, None).unwrap();
    // The kernel's layer is not begun as long as another, which may bring the last of what is wanted, is late.
    faults.plan(&tools, Fault::Late, 1);
    let two = PullOptions { parallel: Some(2), ..PullOptions::default() };
    let pulled = try_pull_with(&spec, &store, None, two).await.unwrap();
    let first = fetched();
    assert_eq!(faults.hits.load(Ordering::SeqCst), 1);
    assert!(!pulled.complete && first.len() == 4, "{first:?} {pulled:?}");

    // There is no room for the rest: that is said with numbers, and what is there stays.
    let objects = store.content_objects().unwrap();
    let used: u64 = run("du", &["-sk", &tmpfs.0]).split_whitespace().next().unwrap().parse().unwrap();
    run("mount", &["-o", &format!("remount,size={}k", used + 100), &tmpfs.0]);
    let told = try_pull_with(&spec, &store, None, complete()).await.unwrap_err();
    println!("{told}");
    assert_eq!((told.kind, told.kind.class()), (Kind::NoSpace, Class::Permanent), "{told}");
    for words in ["MiB are free", "objects of about", "are still to come", &tmpfs.0, "ram_limit"] {
        assert!(told.to_string().contains(words), "{words}: {told}");
    }
    assert!(store.content_objects().unwrap().is_superset(&objects));
    assert_eq!(store.resolve_ref().unwrap(), Some(image.id()));
    let tried = fetched();
    assert!(tried.iter().all(|layer| !first.contains(layer)), "the kernel's layer alone: {tried:?}");

    run("mount", &["-o", "remount,size=64m", &tmpfs.0]);
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    let second = fetched();
    assert!(pulled.complete && second.len() == 1, "{second:?} {pulled:?}");
    let mut both = [first, second].concat();
    both.sort();
    assert_eq!(both, layers, "each layer once");
    fsck(store.repo_path());
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(&bench.repo.path, &image.commit));
    // And once it is complete, there is nothing to ask for.
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    assert_eq!(fetched(), [""; 0]);
}
