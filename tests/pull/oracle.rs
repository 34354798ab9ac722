//! Our importer and ostree-ext's, on the same images: random stacks of plain layers, and the images of the
//! test bed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use super::derived::{Labels, base, capability, complete};
use super::fixture::{Compress, Image, encapsulate, listing, run};
use super::layers::{Item, What, built, by_ostree_ext, difference, item, layer, oracle};
use super::plain::{almost_empty, labelled_system, plain};
use super::registry::Registry;
use super::tree::chunker;
use super::{Bench, NodeStore, fsck, try_pull_with};

/// A layer of some entries below a few directories, in any order. What ostree-ext (with libostree 2022.7)
/// refuses or gets wrong is not made: hardlinks out of the layer, attributes that sort behind the label, a directory
/// where a lower layer has a file. Names sort behind `.wh.`: libostree applies whiteouts in order of names.
pub fn random_layer(rng: &mut StdRng, last: bool) -> Vec<Item> {
    let tops = ["usr/share/t", "etc/t", "usr/lib/t", "usr/bin", "usr/share", "var/t"];
    let mut entries: BTreeMap<String, Item> = BTreeMap::new();
    let mut whiteouts: BTreeSet<String> = BTreeSet::new();
    for _ in 0..rng.random_range(1..25) {
        let mut dir = tops.choose(rng).unwrap().to_string();
        for _ in 0..rng.random_range(0..3) {
            dir = format!("{dir}/d{}", rng.random_range(0..2));
        }
        let mut file = format!("{dir}/f{}", rng.random_range(0..3));
        if rng.random_bool(0.1) {
            // Longer than a header has room for.
            file =
                format!("{dir}/{}/{}", "g".repeat(rng.random_range(60..120)), "long".repeat(rng.random_range(10..60)));
        }
        let owner = (rng.random_range(0..3), rng.random_range(0..70_000));
        let mut new = match rng.random_range(0..12) {
            0..5 => {
                let content = vec![rng.random(); [0, 1, 700, 600_000][rng.random_range(0..4)]];
                item(&file, What::File(content, *[0o644, 0o4755, 0o600, 0o2711].choose(rng).unwrap()))
            }
            5 => item(&file, What::Symlink(["x", "../y", "/usr/bin/bash"].choose(rng).unwrap().to_string())),
            6 | 7 => item(&dir, What::Dir(*[0o755, 0o700, 0o1777].choose(rng).unwrap())),
            8 => {
                whiteouts.insert(format!("{dir}/.wh.{}{}", ["f", "d"].choose(rng).unwrap(), rng.random_range(0..2)));
                continue;
            }
            9 => {
                let odd = [".wh..wh..opq", ".wh..wh..opq", ".wh..wh.plnk", ".wh.no such", ".wh.x.wh.y"];
                whiteouts.insert(format!("{dir}/{}", odd.choose(rng).unwrap()));
                continue;
            }
            10 => item(["opt/x", "run/x", "srv", "root/y"].choose(rng).unwrap(), What::File(vec![1], 0o644)),
            // A file where a lower layer may have a directory.
            _ if last => item(&format!("{dir}/d1"), What::File(vec![7], 0o644)),
            _ => continue,
        };
        new.owner = owner;
        if rng.random_bool(0.2) && matches!(new.what, What::File(..)) {
            new.xattrs = capability();
        }
        let below = format!("{}/", new.path);
        let clash = entries.keys().any(|path| {
            let is_file = |path: &str| entries.get(path).is_some_and(|other| !matches!(other.what, What::Dir(_)));
            (!matches!(new.what, What::Dir(_)) && path.starts_with(&below))
                || (new.path.starts_with(&format!("{path}/")) && is_file(path))
        });
        let parent_is_whiteout_target = whiteouts.iter().any(|path| path.starts_with(&below));
        if !clash && (!parent_is_whiteout_target || matches!(new.what, What::Dir(_))) {
            entries.entry(new.path.clone()).or_insert(new);
        }
    }
    whiteouts.retain(|path| {
        !entries.iter().any(|(file, item)| !matches!(item.what, What::Dir(_)) && path.starts_with(&format!("{file}/")))
    });
    let mut items: Vec<Item> = entries.into_values().collect();
    items.extend(whiteouts.iter().map(|path| item(path, What::File(Vec::new(), 0o644))));
    items.shuffle(rng);
    let files: Vec<String> = items
        .iter()
        .filter(|item| matches!(&item.what, What::File(content, _) if !content.is_empty()))
        .map(|item| item.path.clone())
        .filter(|path| path.starts_with("usr/") || path.starts_with("etc/"))
        .collect();
    for at in 0..rng.random_range(0..3) {
        if let Some(target) = files.choose(rng) {
            items.push(item(&format!("usr/share/link{at}"), What::Hardlink(target.clone())));
        }
    }
    items
}

/// The seeds of a random test: `PIVOT_SEEDS` (12) from `PIVOT_SEED` (1) on.
pub fn seeds() -> Range<u64> {
    let variable = |name: &str, default| std::env::var(name).ok().map_or(default, |value| value.parse().unwrap());
    let first = variable("PIVOT_SEED", 1);
    first..first + variable("PIVOT_SEEDS", 12)
}

#[tokio::test(flavor = "multi_thread")]
async fn random_layer_stacks_are_imported_alike() {
    let bench = Bench::new();
    let oracle = oracle();
    // Two encapsulated bases, and a plain system, which ostree-ext imports over an encapsulated commit.
    let same = |image: Image| (image.clone(), image);
    let system = layer(&labelled_system());
    let mut over_empty = almost_empty(&bench);
    over_empty.layers.push(system.clone());
    for (labels, (mut bottom, mut theirs)) in [
        ("unlabelled", same(base(&bench, Labels::None))),
        ("labelled", same(base(&bench, Labels::Own))),
        ("plain", (plain(vec![system]), over_empty)),
    ] {
        // The base is read once by each; only the layers on top are new.
        let (name, repo) = (format!("ours-{labels}"), bench.path(&format!("theirs-{labels}")));
        let store = bench.store(&name, None);
        // Compressing is most of what a debug build would do here.
        bottom.layers.iter_mut().chain(&mut theirs.layers).for_each(|layer| layer.compress = Compress::None);
        for seed in seeds() {
            let mut rng = StdRng::seed_from_u64(seed);
            let count = rng.random_range(1..4);
            let stack: Vec<Vec<Item>> = (0..count).map(|at| random_layer(&mut rng, at + 1 == count)).collect();
            let push = |image: &Image, name: &str| {
                let mut image = image.clone();
                image.layers.extend(stack.iter().map(|items| layer(items)));
                bench.push(&image, &format!("random:{name}-{labels}-{seed}"))
            };
            let spec = push(&bottom, "ours");
            let told = || format!("PIVOT_SEED={seed} {labels}: {stack:#?}").replace(&"0,\n".repeat(3), "");
            try_pull_with(&spec, &store, None, complete()).await.unwrap_or_else(|error| panic!("{error} {}", told()));
            let theirs = by_ostree_ext(&oracle, &push(&theirs, "theirs"), &repo)
                .unwrap_or_else(|error| panic!("{error} {}", told()));
            let ours = listing(store.repo_path(), "coreos/node-image");
            assert!(ours == theirs, "{}\n{}", difference(&ours, &theirs), told());
        }
        fsck(store.repo_path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parent_directories_in_the_archive_change_nothing() {
    let bench = Bench::new();
    let image = super::image(&bench, 1, 2);
    let spec = bench.push(&image, "format:2");
    let store = bench.store("ours", None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let repo = bench.path("theirs");
    by_ostree_ext(&oracle(), &spec, &repo).unwrap();
    let (ours, theirs) = (listing(store.repo_path(), "coreos/node-image"), listing(&repo, &image.commit));
    assert!(ours == theirs, "{}", difference(&ours, &theirs));
}

/// `storage` of the test bed's registry, built when it is not. `PIVOT_TESTBED_REGISTRY` names another
/// directory. Without optimisation, hashing gigabytes takes minutes: then only when it is named.
fn testbed_storage() -> Option<PathBuf> {
    if let Ok(path) = std::env::var("PIVOT_TESTBED_REGISTRY") {
        return Some(path.into());
    }
    if cfg!(debug_assertions) {
        println!("left out of a debug build: use --release, or set PIVOT_TESTBED_REGISTRY");
        return None;
    }
    Some(Path::new(&built("registry")).join("storage"))
}

/// Type, mode, owner, size and path of each line of a listing.
fn without_labels(listing: &str) -> String {
    let line = |line: &str| {
        let what: Vec<&str> = line.split_whitespace().take(4).collect();
        let path = line.rsplit_once(" } ").map_or("", |(_, path)| path);
        format!("{} {path}\n", what.join(" "))
    };
    listing.lines().map(line).collect()
}

/// Returns a listing without `/var`, which older libostree has elsewhere in the tree of a plain image, and without the
/// checksums of trees.
fn without_var(listing: &str) -> String {
    let var = ["/var", "/usr/share/factory", "/usr/share/factory/var"];
    let line = |line: &str| {
        let mut words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let is_dir = words[0].starts_with('d');
        if is_dir {
            words.remove(4);
        }
        let is_var = is_dir && words.last().is_some_and(|path| var.contains(path));
        (!is_var).then(|| words.join(" ") + "\n")
    };
    listing.lines().filter_map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_test_beds_images_are_imported_alike() {
    let Some(storage) = testbed_storage() else { return };
    let oracle = oracle();
    let temp = tempfile::tempdir().unwrap();
    let registry = Registry::serve(storage, temp.path(), None);
    for name in ["node-a", "node-b"] {
        let spec = format!("{}/cluster/{name}:latest", registry.address);
        let root = temp.path().join(name);
        std::fs::create_dir_all(&root).unwrap();
        let store = NodeStore::on_tmpfs(&root, None).unwrap();
        let start = std::time::Instant::now();
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        let ours_took = start.elapsed().as_secs_f64();
        fsck(store.repo_path());
        let start = std::time::Instant::now();
        let repo = temp.path().join(format!("{name}-theirs"));
        let merged = by_ostree_ext(&oracle, &spec, &repo).unwrap();
        println!("{name}: {ours_took:.1} s, ostree-ext {:.1} s: {pulled:?}", start.elapsed().as_secs_f64());
        let ours = listing(store.repo_path(), "coreos/node-image");
        let theirs = listing(&repo, &pulled.commit.to_string());
        assert!(ours == theirs, "{name}: {}", difference(&ours, &theirs));
        // ostree-ext labels its merge commit by the image's policy even when nothing was laid over the
        // commit. The test bed's trees have no labels, so checksums and attributes differ, and nothing else.
        let (ours, labelled) = (without_labels(&ours), merged);
        let merged = without_labels(&labelled);
        assert!(ours == merged, "{name}: {}", difference(&ours, &merged));
        if name == "node-b" {
            // The same tree as a plain image: it gets the same labels.
            std::fs::create_dir(root.join("plain")).unwrap();
            let store = NodeStore::on_tmpfs(&root.join("plain"), None).unwrap();
            let spec = format!("{}/cluster/node-b-plain:latest", registry.address);
            try_pull_with(&spec, &store, None, complete()).await.unwrap();
            fsck(store.repo_path());
            let plain = without_var(&listing(store.repo_path(), "coreos/node-image"));
            let labelled = without_var(&labelled);
            assert!(plain == labelled, "{}", difference(&plain, &labelled));
        }
        std::fs::remove_dir_all(repo).unwrap();
        std::fs::remove_dir_all(root).unwrap();
    }
}

/// Everything of a system's `/usr` and `/etc` by name, with nothing in it, as one plain layer over a base that has a
/// distribution's policy: each label is what libselinux says.
#[tokio::test(flavor = "multi_thread")]
async fn a_distributions_policy_labels_alike() {
    if cfg!(debug_assertions) {
        println!("left out of a debug build: use --release");
        return;
    }
    let bench = Bench::new();
    let system = format!("--repo={}", Path::new(&built("tree_selinux_node")).join("repo").display());
    let base = bench.path("base");
    let policy = base.join("usr/etc/selinux");
    std::fs::create_dir_all(policy.parent().unwrap()).unwrap();
    let part = "--subpath=/usr/etc/selinux";
    run("ostree", &["checkout", &system, part, "selinux-node", policy.to_str().unwrap()]);
    // The module store is large and says nothing about labels.
    std::fs::remove_dir_all(policy.join("default/active")).unwrap();
    let repo = format!("--repo={}", bench.repo.path.display());
    let (tree, labels) = (format!("--tree=dir={}", base.display()), format!("--selinux-policy={}", base.display()));
    let commit = run("ostree", &["commit", &repo, "-b", "base", &tree, &labels, "-s", "base"]);
    let mut image = encapsulate(&bench.repo, commit.trim(), &chunker, 1);

    let names = run("ostree", &["ls", "-R", &system, "selinux-node", "/usr"]);
    let items: Vec<Item> = names
        .lines()
        .filter_map(|line| {
            let path = &line[line.find(" /usr/")? + 2..];
            if path.starts_with("usr/etc/selinux") || path.starts_with("usr/lib/modules") {
                return None;
            }
            Some(match line.as_bytes()[0] {
                b'd' => item(path, What::Dir(0o755)),
                b'l' => item(path.split_once(" -> ")?.0, What::Symlink("x".into())),
                _ => item(path, What::File(Vec::new(), 0o644)),
            })
        })
        .collect();
    assert!(items.len() > 5000, "{} names", items.len());
    image.layers.push(layer(&items));
    let spec = bench.push(&image, "policy:real");
    let store = bench.store("ours", None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let ours = listing(store.repo_path(), "coreos/node-image");
    let theirs = by_ostree_ext(&oracle(), &spec, &bench.path("theirs")).unwrap();
    let kinds: BTreeSet<&str> = ours.split('\'').filter(|word| word.contains(":object_r:")).collect();
    assert!(kinds.len() > 50, "{} different labels", kinds.len());
    assert!(ours == theirs, "{}", difference(&ours, &theirs));
}
