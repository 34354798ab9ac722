//! Refs that others left in the repos, sense or nonsense: none of them changes what a pull makes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use node_store::import::{PullOptions, PulledImage};
use node_store::store::{BootedRepo, layer_ref};

use super::derived::complete;
use super::fixture::{Repo, listing, run};
use super::{Bench, fsck, image, try_pull_with};

/// Refs to nothing, with odd names and odd content.
fn garbage(repo: &Path) {
    let refs = repo.join("refs");
    let write = |name: &[u8], content: &[u8]| {
        let path = refs.join(OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    let missing = format!("{}\n", "ab".repeat(32));
    write(b"heads/missing", missing.as_bytes());
    write(b"heads/garbage", b"no checksum at all");
    write(b"heads/empty", b"");
    write(b"heads/binary", &[0xff; 300]);
    write(b"heads/with space/and ~strange", missing.as_bytes());
    write(b"heads/\xff\xfe", missing.as_bytes());
    write(b"heads/ostree/container/image/docker_3A__2F__2F_q_2E_io/x", missing.as_bytes());
    write(b"heads/ostree/container/blob/not-a-digest", b"?");
    write(b"heads/ostree/container/blob/sha256_3A_", missing.as_bytes());
    write(b"remotes/fedora/stable", missing.as_bytes());
    write(b"mirrors/org.example/x", missing.as_bytes());
    fs::create_dir_all(refs.join("heads/ostree/container/blob/a-directory")).unwrap();
    std::os::unix::fs::symlink("nowhere", refs.join("heads/dangling")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_refs_change_nothing() {
    let bench = Bench::new();
    let (old, new) = (image(&bench, 1, 1), image(&bench, 2, 1));
    let spec = bench.push(&new, "refs:1");
    let layout = format!("oci:{}", bench.path("layout").display());
    let manifest: serde_json::Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
    let digests: Vec<&str> =
        manifest["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap()).collect();
    let booted_repo = Repo::create(&bench.path("booted"));
    let (booted_path, source) = (booted_repo.path.to_str().unwrap(), bench.repo.path.to_str().unwrap());
    run("ostree", &["pull-local", "--repo", booted_path, source, &old.commit]);
    let booted = BootedRepo { path: booted_repo.path.clone(), commit: Some(old.id()) };
    let expected = listing(&bench.repo.path, &new.commit);

    // Without any of it, for comparison.
    let store = bench.store("clean", Some(&booted));
    let clean = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();

    garbage(&booted_repo.path);
    let store = bench.store("foreign", Some(&booted));
    garbage(store.repo_path());
    store.set_ref(&old.id()).unwrap();
    let pulled = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
    // How much of the last layers comes before nothing is wanted any more is a matter of timing.
    let timing =
        |pulled: &PulledImage| PulledImage { bytes_fetched: 0, layers_fetched: 0, layers_skipped: 0, ..pulled.clone() };
    assert_eq!(timing(&pulled), timing(&clean));
    assert_eq!(store.resolve_ref().unwrap(), Some(new.id()), "not where it pointed before");
    run("ostree", &["ls", "-R", "--repo", store.repo_path().to_str().unwrap(), "coreos/node-image", "/usr/bin"]);

    // The booted repo claims to have every layer: as a ref to a commit that is missing, as garbage, as a ref to
    // a commit whose content was left out. What is not there is fetched all the same.
    let partial = format!("{}\n", old.commit);
    fs::write(booted_repo.path.join("state").join(format!("{}.commitpartial", old.commit)), "").unwrap();
    for (index, digest) in digests.iter().enumerate() {
        let path = booted_repo.path.join("refs/heads").join(layer_ref(digest));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, [&partial, "garbage", &format!("{}\n", "cd".repeat(32))][index % 3]).unwrap();
    }
    let store = bench.store("claimed", Some(&booted));
    fs::create_dir_all(store.repo_path().join("refs/heads/coreos")).unwrap();
    fs::write(store.repo_path().join("refs/heads/coreos/node-image"), "garbage").unwrap();
    let pulled = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
    assert_eq!((pulled.commit, pulled.objects_written), (clean.commit, clean.objects_written));

    // All of it, from a store whose parent is such a repo.
    let store = bench.store("whole", None);
    garbage(store.repo_path());
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), expected);
    fs::remove_dir_all(store.repo_path().join("refs/heads/ostree")).unwrap();
    for name in ["missing", "garbage", "empty", "binary", "with space", "dangling"] {
        let path = store.repo_path().join("refs/heads").join(name);
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    }
    fs::remove_file(store.repo_path().join("refs/heads").join(OsStr::from_bytes(b"\xff\xfe"))).unwrap();
    fs::remove_dir_all(store.repo_path().join("refs/remotes/fedora")).unwrap();
    fs::remove_dir_all(store.repo_path().join("refs/mirrors/org.example")).unwrap();
    fsck(store.repo_path());
}
