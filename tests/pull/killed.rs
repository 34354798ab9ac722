//! Pulls that are killed.

use std::fs;
use std::path::Path;

use node_store::store::NodeStore;

use super::derived::{Labels, base, complete};
use super::fixture::listing;
use super::layers::{What, item, layer};
use super::tree::noise;
use super::waits::{files_below, wait_for_files};
use super::{Bench, fsck, try_pull_with};

/// The agent, killed at any moment, finds a store that it can go on with.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pull_is_resumed_to_the_same_tree() {
    let bench = Bench::new();
    let mut image = base(&bench, Labels::Own);
    image.layers.push(layer(&[item("usr/bin/newtool", What::File(noise(900_000, 3), 0o755))]));
    let spec = bench.push(&image, "os:1");
    let store = bench.store("store", None);
    for more in [0, 1, 2, 4, 8, 16, 32] {
        let before = files_below(store.repo_path());
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "killed::child_pull"])
            .env("PIVOT_CHILD", format!("{spec} {}", store.root().display()))
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        wait_for_files(&mut child, store.repo_path(), before, more);
        child.kill().unwrap();
        child.wait().unwrap();
        let temporary = fs::read_dir(store.repo_path().join("tmp")).unwrap().count();
        println!("killed after {more} files: {} objects, {temporary} in tmp", store.content_objects().unwrap().len());
    }
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    assert!(pulled.complete);
    fsck(store.repo_path());
    let whole = bench.store("whole", None);
    let at_once = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    assert_eq!(pulled.commit, at_once.commit);
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(whole.repo_path(), "coreos/node-image"));
    assert_eq!(fs::read_dir(store.repo_path().join("tmp")).unwrap().count(), 1, "only tmp/cache is left");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the child of a_killed_pull_is_resumed_to_the_same_tree"]
async fn child_pull() {
    let Ok(arguments) = std::env::var("PIVOT_CHILD") else { return };
    let (spec, root) = arguments.split_once(' ').unwrap();
    try_pull_with(spec, &NodeStore::open(Path::new(root)).unwrap(), None, complete()).await.unwrap();
}
