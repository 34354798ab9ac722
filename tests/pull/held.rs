//! Layers that the booted repo holds, and the order of the layers of a plain image.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use node_store::import::{PullOptions, PulledImage};
use node_store::store::BootedRepo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::derived::{CONTEXTS, Labels, base, complete, layers, with};
use super::fixture::{Compress, Image, RawLayer, fsck, listing, run};
use super::image_refs::Counted;
use super::layers::{Item, What, by_ostree_ext, dir, file, item, layer, link, oracle};
use super::plain::{almost_empty, labelled_system, plain, policy, system};
use super::tree::noise;
use super::{Bench, image, try_pull, try_pull_with};

/// Imports an image with ostree-ext. Returns the repo as that of a system that booted this image.
fn booted_by_ostree_ext(bench: &Bench, oracle: &str, image: &Image, name: &str) -> BootedRepo {
    let path = bench.path(name);
    by_ostree_ext(oracle, &bench.push(image, &format!("{name}:1")), &path).unwrap();
    let mut queue: Vec<PathBuf> = vec![path.join("refs/heads/ostree/container/image")];
    let commit = loop {
        let next = queue.pop().unwrap();
        match fs::read_dir(&next) {
            Ok(entries) => queue.extend(entries.map(|entry| entry.unwrap().path())),
            Err(_) => break fs::read_to_string(next).unwrap().trim().to_owned(),
        }
    };
    BootedRepo { path, commit: commit.parse().ok() }
}

/// Makes `image` the booted one, without an import: the importers of plain images wrote such a commit. `filtered` is its
/// record of left-out entries, which bootc 1.6 and later do not write. `change` edits its config.
fn recorded(
    bench: &Bench,
    booted: &BootedRepo,
    image: &Image,
    filtered: Option<&str>,
    change: impl FnOnce(&mut Value),
) -> BootedRepo {
    let layout = bench.path("recorded");
    image.write(&layout);
    let inspect =
        |what: &[&str]| run("skopeo", &[&["inspect"], what, &[&format!("oci:{}", layout.display())]].concat());
    let mut config: Value = serde_json::from_str(&inspect(&["--config", "--raw"])).unwrap();
    change(&mut config);
    let mut args = vec![
        "commit".to_owned(),
        format!("--repo={}", booted.path.display()),
        "--branch=ostree/container/image/recorded".into(),
        format!("--tree=ref={}", booted.commit.unwrap()),
        format!("--add-metadata-string=ostree.manifest={}", inspect(&["--raw"])),
        format!("--add-metadata-string=ostree.container.image-config={config}"),
    ];
    args.extend(filtered.map(|text| format!("--add-metadata=ostree.tar-filtered={text}")));
    let commit = run("ostree", &args.iter().map(String::as_str).collect::<Vec<_>>());
    BootedRepo { path: booted.path.clone(), commit: commit.trim().parse().ok() }
}

/// Removes the images that ostree-ext imported. Their layers stay.
fn forget_imports(booted: &BootedRepo) {
    let images = booted.path.join("refs/heads/ostree/container/image");
    for entry in fs::read_dir(images).unwrap().flatten().filter(|entry| entry.file_name() != "recorded") {
        fs::remove_dir_all(entry.path()).unwrap();
    }
}

fn recompressed(mut image: Image) -> Image {
    image.layers.iter_mut().for_each(|layer| layer.compress = Compress::Zstd);
    image
}

fn update() -> Vec<Item> {
    vec![
        item("usr/bin/kubelet", What::File(noise(600_000, 7), 0o755)),
        file("usr/share/.wh.stable", ""),
        file("usr/share/new", "new"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_layers_of_the_booted_system_are_not_fetched() {
    let bench = Bench::new();
    let oracle = oracle();
    let stack = [
        labelled_system(),
        vec![
            Item { owner: (7, 8), ..dir("usr/bin/") },
            file("usr/share/two", "2"),
            file("usr/bin/.wh.bash", ""),
            file("etc/app/.wh..wh..opq", ""),
        ],
        vec![file("run/left-out", ""), file("usr/share/three", "3")],
    ];
    let below: Vec<_> = stack.iter().map(|items| layer(items)).collect();
    let over = |mut bottom: Image| {
        bottom.layers.extend(below.iter().cloned());
        bottom
    };
    let no_change = |_: &mut Value| {};
    for (name, bottom, fetched) in [
        ("plain", plain(Vec::new()), 2),
        ("no-record", plain(Vec::new()), 1),
        ("derived", base(&bench, Labels::Own), 3),
    ] {
        let theirs = if name == "derived" { bottom.clone() } else { almost_empty(&bench) };
        let mut booted = booted_by_ostree_ext(&bench, &oracle, &over(theirs), &format!("booted-{name}"));
        if name != "derived" {
            let left_out = format!("{{'{}': {{'/run': uint32 1}}}}", digest(&bench, &over(bottom.clone()), 2));
            let filtered = (name == "plain").then_some(left_out.as_str());
            booted = recorded(&bench, &booted, &over(bottom.clone()), filtered, no_change);
            forget_imports(&booted);
        }
        let newer = recompressed(with(over(bottom), &[update()]));
        let spec = bench.push(&newer, &format!("held:{name}"));
        let store = bench.store(name, Some(&booted));
        let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
        // The new layer, and those of which the record says that entries were left out: of a derived layer, all
        // top-level ones.
        assert_eq!(pulled.layers_fetched, fetched, "{name}: {pulled:?}");
        assert!(pulled.complete, "{name}: {pulled:?}");
        let whole = bench.store(&format!("{name}-whole"), None);
        let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
        assert_eq!(pulled.commit, expected.commit, "{name}");
        let words = "its mode 0755 and owner 7:8 for the directory";
        let ignored = |image: &PulledImage| image.warnings.iter().filter(|line| line.contains(words)).count();
        assert_eq!([&pulled, &expected].map(ignored), [1, 1], "{name}: {:?}", pulled.warnings);
        let ours = listing(store.repo_path(), "coreos/node-image");
        assert_eq!(ours, listing(whole.repo_path(), "coreos/node-image"), "{name}");
        assert!(ours.contains("/usr/share/two") && !ours.contains("/usr/bin/bash"), "{ours}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_a_commit_are_matched_by_diff_id() {
    let bench = Bench::new();
    let booted = booted_by_ostree_ext(&bench, &oracle(), &image(&bench, 1, 1), "booted");
    let spec = bench.push(&recompressed(image(&bench, 2, 1)), "held:commit");
    let store = bench.store("commit", Some(&booted));
    let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
    // The commit, kubelet and the tools: the booted system holds the layer "stable", and the kernel is not wanted.
    assert_eq!(pulled.layers_fetched, 3, "{pulled:?}");
}

/// A held layer whose objects are gone is fetched.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_missing_objects_is_fetched() {
    let bench = Bench::new();
    let lost = vec![file("usr/share/lost", "lost")];
    let mut theirs = almost_empty(&bench);
    theirs.layers.extend([layer(&labelled_system()), layer(&lost)]);
    let image = plain(vec![layer(&labelled_system()), layer(&lost)]);
    let booted = booted_by_ostree_ext(&bench, &oracle(), &theirs, "booted");
    let booted = recorded(&bench, &booted, &image, None, |_| {});
    forget_imports(&booted);
    let spec = bench.push(&image, "held:lost");
    let whole = bench.store("whole", None);
    let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    let id = content_at(&booted.path, &booted.commit.unwrap().to_string(), "/usr/share/lost").unwrap();
    fs::remove_file(booted.path.join(format!("objects/{}/{}.file", &id[..2], &id[2..]))).unwrap();
    // The commit of the layer has the file with another label.
    let store = bench.store("lost", Some(&booted));
    let pulled = try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
    assert_eq!(pulled.commit, expected.commit);
    assert!(pulled.complete, "{pulled:?}");
}

/// Returns the digest of a layer of the image.
fn digest(bench: &Bench, image: &Image, at: usize) -> String {
    let layout = bench.path("digests");
    image.write(&layout);
    let manifest = run("skopeo", &["inspect", "--raw", &format!("oci:{}", layout.display())]);
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    manifest["layers"][at]["digest"].as_str().unwrap().to_owned()
}

/// An image that is not booted claims the diff id of another image's layer. ostree-ext does not verify diff ids.
#[tokio::test(flavor = "multi_thread")]
async fn a_diff_id_of_an_image_that_is_not_booted_is_not_trusted() {
    let bench = Bench::new();
    let (good, evil) = (layer(&[file("usr/share/a", "good")]), layer(&[file("usr/share/a", "evil")]));
    let over = |mut bottom: Image, top: &RawLayer| {
        bottom.layers.extend([layer(&labelled_system()), top.clone()]);
        bottom
    };
    let booted = booted_by_ostree_ext(&bench, &oracle(), &over(almost_empty(&bench), &evil), "booted");
    let image = over(plain(Vec::new()), &good);
    let spec = bench.push(&image, "held:signed");
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&good.tar)));
    let claim = |config: &mut Value| config["rootfs"]["diff_ids"][1] = json!(diff_id);
    let other = recorded(&bench, &booted, &over(plain(Vec::new()), &evil), Some("@a{sa{su}} {}"), claim);
    forget_imports(&other);
    let booted = BootedRepo { commit: None, ..other };
    let store = bench.store("signed", Some(&booted));
    let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
    // The layer below has the digest of the other image's layer.
    assert_eq!(pulled.layers_fetched, 1, "{pulled:?}");
    let whole = bench.store("whole", None);
    assert_eq!(pulled.commit, try_pull_with(&spec, &whole, None, complete()).await.unwrap().commit);
}

/// An image has no record of the layers that an earlier image brought.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_left_out_entries_that_nothing_records_is_fetched() {
    let bench = Bench::new();
    let stack = [layer(&labelled_system()), layer(&[file("opt/lost", "lost")])];
    let mut theirs = base(&bench, Labels::Own);
    theirs.layers.extend(stack.clone());
    let spec = bench.push(&plain(stack.to_vec()), "held:unrecorded");
    let whole = bench.store("whole", None);
    let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    let imported = booted_by_ostree_ext(&bench, &oracle(), &theirs, "booted");
    for (name, filtered) in [("empty", Some("@a{sa{su}} {}")), ("none", None)] {
        let booted = recorded(&bench, &imported, &theirs, filtered, |_| {});
        if name == "empty" {
            forget_imports(&booted);
        }
        let store = bench.store(name, Some(&booted));
        let pulled = try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
        assert_eq!((pulled.layers_fetched, pulled.commit), (2, expected.commit), "{name}");
    }
}

/// Differences were the root, to which libostree gives the owner of an entry without a parent, and empty files.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_first_layer_gives_the_tree_of_a_fetched_one() {
    let bench = Bench::new();
    let root = vec![item("./", What::Dir(0o555))];
    let orphan = vec![Item { owner: (7, 8), ..file("usr/orphan/file", "") }];
    let mut rest = labelled_system();
    rest.retain(|item| item.path != "./");
    // An empty file that a build leaves is removed on both ways, but not the other names of that file.
    rest.extend([file("etc/hostname", ""), link("etc/named", "etc/hostname")]);
    rest.extend([file("etc/empty", ""), link("etc/resolv.conf", "etc/empty")]);
    for (name, items, shown) in
        [("no-entry", [rest.clone(), orphan], "d00755 7 8 "), ("first", [root, rest], "d00755 0 0 ")]
    {
        let items = items.concat();
        let image = plain(vec![layer(&items)]);
        let mut theirs = almost_empty(&bench);
        theirs.layers.extend(image.layers.clone());
        let booted = booted_by_ostree_ext(&bench, &oracle(), &theirs, name);
        let booted = recorded(&bench, &booted, &image, None, |_| {});
        forget_imports(&booted);
        let spec = bench.push(&image, &format!("root:{name}"));
        let (store, whole) =
            (bench.store(&format!("{name}-held"), Some(&booted)), bench.store(&format!("{name}-whole"), None));
        let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
        let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
        assert_eq!((pulled.layers_fetched, pulled.commit), (0, expected.commit), "{name}");
        let listed = listing(whole.repo_path(), "coreos/node-image");
        assert!(listed.contains("/usr/etc/named") && !listed.contains("/usr/etc/resolv.conf"), "{name}: {listed}");
        let first: Vec<&str> = listed.split_whitespace().take(5).collect();
        assert!(first.join(" ").starts_with(shown), "{name}: {first:?}");
    }
}

fn content_at(repo: &Path, commit: &str, path: &str) -> Option<String> {
    let all = listing(repo, commit);
    let line = all.lines().find(|line| line.ends_with(path))?;
    line.split_whitespace().nth(4).map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_layer_with_the_policy_is_read_first() {
    let counted = Counted::new();
    let bench = &counted.bench;
    let mut trees = Vec::new();
    for (name, component) in [("annotated", Some("rpm/selinux-policy-targeted")), ("unknown", None)] {
        let mut rules = layer(&policy("test", CONTEXTS));
        rules.components = component;
        let mut kernel = layer(&[file("usr/lib/modules/6.2/vmlinuz", "kernel")]);
        kernel.components = component.map(|_| "rpm/kernel-core");
        let stack = vec![kernel, layer(&system()), layer(&layers()[0]), rules];
        let store = bench.store(name, None);
        let spec = counted.push(&plain(stack), &format!("policy:{name}"));
        counted.served();
        let pulled = try_pull_with(&spec, &store, None, PullOptions { parallel: Some(1), ..complete() }).await.unwrap();
        if component.is_some() {
            let (served, layers) = (counted.served(), counted.layers());
            let order: Vec<_> = served.iter().map(|digest| layers.iter().position(|layer| layer == digest)).collect();
            assert_eq!(order, [3, 1, 2, 0].map(Some), "first the policy, last the kernel");
        }
        fsck(store.repo_path());
        let tree = listing(store.repo_path(), "coreos/node-image");
        let files = tree.lines().filter(|line| !line.starts_with('d'));
        let needed: BTreeSet<&str> = files.filter_map(|line| line.split_whitespace().nth(4)).collect();
        // Only the files of the policy were read before their labels were known. The commits of layers also have a file that
        // a later layer removes, and the whiteout that removes it.
        let copied = pulled.objects_written as usize - needed.len();
        assert_eq!(copied <= 4, component.is_some(), "{name}: {copied}");
        assert!(store.content_objects().unwrap().len() <= needed.len() + 5, "{name}: one copy of each other file");
        trees.push(tree);
    }
    assert_eq!(trees[0], trees[1]);
}
