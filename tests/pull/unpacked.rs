//! Plain images compared with the trees that umoci and composefs-rs make of their layers and that `ostree commit` labels.
//! These programs and this project share no code and no rules about whiteouts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rand::Rng;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::derived::{CONTEXTS, complete, layers};
use super::fixture::{Compress, Image, fsck, listing, run};
use super::layers::{Item, What, built, difference, dir, file, item, layer, link};
use super::oracle::{random_layer, seeds};
use super::plain::{labelled_system, plain, policy, system};
use super::{Bench, try_pull_with};

/// Directories that stay empty in a commit.
const RUNTIME: [&str; 6] = ["dev", "proc", "run", "sys", "sysroot", "tmp"];

/// The program that unpacks with composefs-rs; `PIVOT_COMPOSEFS` names another one.
static COMPOSEFS: LazyLock<String> =
    LazyLock::new(|| std::env::var("PIVOT_COMPOSEFS").unwrap_or_else(|_| built("composefs")));

/// Unpacks the image that was pushed last with umoci. Returns the root.
fn by_umoci(bench: &Bench, bundle: &Path) -> PathBuf {
    let layout = bench.path("umoci");
    let _ = fs::remove_dir_all(&layout);
    let (from, tagged) = (format!("oci:{}", bench.path("layout").display()), format!("{}:it", layout.display()));
    run("skopeo", &["copy", "-q", "--insecure-policy", &from, &format!("oci:{tagged}")]);
    run("umoci", &["unpack", "--image", &tagged, bundle.to_str().unwrap()]);
    bundle.join("rootfs")
}

/// The same layers with composefs-rs. Version 0.9.4 wants an entry for each directory, and applies a whiteout to the entries
/// before it in the same layer as well.
fn by_composefs(bench: &Bench, items: &[Vec<Item>], bundle: &Path) -> PathBuf {
    let (layout, repo, root) = (bench.path("ordered"), bundle.join("repo"), bundle.join("root"));
    fs::create_dir_all(&root).unwrap();
    let ordered: Vec<Vec<Item>> = items.iter().map(|items| ordered(items)).collect();
    stack(&ordered).write(&layout);
    run(&COMPOSEFS, &[&format!("oci:{}", layout.display()), repo.to_str().unwrap(), root.to_str().unwrap()]);
    root
}

/// Returns the layer with all whiteouts first, and each directory before its content. A whiteout may remove the parent of
/// another one, which the layer then makes again.
fn ordered(items: &[Item]) -> Vec<Item> {
    let is_whiteout = |item: &&Item| item.path.rsplit('/').next().is_some_and(|name| name.starts_with(".wh."));
    let plain = |path: &str| Path::new(path).components().collect::<PathBuf>();
    let (mut whiteouts, others): (Vec<&Item>, Vec<&Item>) = items.iter().partition(is_whiteout);
    whiteouts.sort_by_key(|item| plain(&item.path).components().count());
    let mut all = Vec::new();
    for part in whiteouts.into_iter().map(|item| vec![item]).chain([others]) {
        let parents =
            part.iter().flat_map(|item| plain(&item.path).ancestors().skip(1).map(PathBuf::from).collect::<Vec<_>>());
        let mut dirs: BTreeMap<PathBuf, Item> =
            parents.map(|path| (path.clone(), dir(path.to_str().unwrap()))).collect();
        dirs.remove(Path::new(""));
        dirs.extend(
            part.iter()
                .filter(|item| matches!(item.what, What::Dir(_)))
                .map(|item| (plain(&item.path), (*item).clone())),
        );
        dirs.remove(Path::new("."));
        all.extend(dirs.into_values());
        let rank = |item: &&&Item| matches!(item.what, What::Hardlink(_));
        let mut files: Vec<&&Item> = part.iter().filter(|item| !matches!(item.what, What::Dir(_))).collect();
        files.sort_by_key(rank);
        all.extend(files.into_iter().map(|item| (*item).clone()));
    }
    all
}

/// Puts the files where an ostree commit has them, and commits them. Returns the listing of the commit.
fn committed(bench: &Bench, root: &Path, name: &str) -> String {
    run("find", &[root.to_str().unwrap(), "!", "-type", "f", "!", "-type", "d", "!", "-type", "l", "-delete"]);
    for dir in RUNTIME {
        let _ = fs::remove_dir_all(root.join(dir));
    }
    fs::rename(root.join("etc"), root.join("usr/etc")).unwrap();
    if !ostree::check_version(2024, 3) && root.join("var").exists() {
        fs::create_dir_all(root.join("usr/share/factory")).unwrap();
        fs::rename(root.join("var"), root.join("usr/share/factory/var")).unwrap();
    }
    let repo = bench.repo.path.display();
    let (repo_arg, tree) = (format!("--repo={repo}"), format!("--tree=dir={}", root.display()));
    let labels = format!("--selinux-policy={}", root.display());
    let commit = run("ostree", &["commit", &repo_arg, "-b", name, "-s", name, &tree, &labels]);
    listing(&bench.repo.path, commit.trim())
}

/// Returns the lines that must be equal. A directory in several layers has the metadata of the last of them in these
/// programs, and of the first in ostree-ext and in this importer. The latter also make the directory of a whiteout that
/// hides nothing, so only a test without such whiteouts compares the paths of directories.
fn comparable(listing: &str, directories: bool) -> String {
    let line = |line: &str| match line.strip_prefix('d') {
        Some(rest) => {
            let path = &rest[rest.find(" /").unwrap() + 2..];
            (directories && !RUNTIME.contains(&path)).then(|| format!("directory /{path}\n"))
        }
        None => Some(format!("{line}\n")),
    };
    let mut lines: Vec<String> = listing.lines().filter_map(line).collect();
    lines.sort();
    lines.concat()
}

async fn compared(bench: &Bench, items: &[Vec<Item>], name: &str, directories: bool, shown: &dyn Fn() -> String) {
    let spec = bench.push(&stack(items), &format!("unpacked:{name}"));
    let store = bench.store(name, None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap_or_else(|error| panic!("{error} {}", shown()));
    fsck(store.repo_path());
    let ours = comparable(&listing(store.repo_path(), "coreos/node-image"), directories);
    for program in ["umoci", "composefs"] {
        // composefs-rs syncs each file.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let bundle = memory.path().join(program);
        let root = if program == "umoci" { by_umoci(bench, &bundle) } else { by_composefs(bench, items, &bundle) };
        let theirs = comparable(&committed(bench, &root, name), directories);
        assert!(ours == theirs, "{name}, {program}:\n{}\n{}", difference(&ours, &theirs), shown());
    }
    fs::remove_dir_all(store.root()).unwrap();
}

fn stack(items: &[Vec<Item>]) -> Image {
    let mut image = plain(items.iter().map(|items| layer(items)).collect());
    image.layers.iter_mut().for_each(|layer| layer.compress = Compress::None);
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_images_equal_what_others_unpack() {
    let bench = Bench::new();
    let changed = policy("test", &CONTEXTS.replace("bin_t", "tool_t"));
    for (name, mut items) in [
        ("labelled", vec![labelled_system()]),
        ("late-policy", vec![system(), policy("test", CONTEXTS)]),
        ("changed-policy", vec![labelled_system(), changed]),
    ] {
        items.extend(layers());
        compared(&bench, &items, name, true, &String::new).await;
    }
    // A build that replaces the whole /etc.
    let replaced = [vec![file(".wh.etc", ""), file("etc/new", "new")], policy("test", CONTEXTS)].concat();
    let items = [labelled_system(), vec![file("etc/old", "old")], replaced];
    compared(&bench, &items, "replaced-etc", false, &String::new).await;
    // ostree-ext refuses hardlinks to files of the layers below, and libostree takes whiteouts in the order of names.
    let below = vec![
        Item { owner: (81, 82), ..item("usr/share/first", What::File(b"first".to_vec(), 0o640)) },
        file("usr/share/becomes-dir", "a file"),
        file("usr/share/dots/.a", "below"),
        file("usr/share/dots/.wg", "below"),
        file("usr/share/dots/b", "below"),
        file("usr/share/opaque/.a", "below"),
        file("usr/share/opaque/b", "below"),
        dir("usr/share/becomes-file/.d"),
        file("usr/share/becomes-file/.d/.a", "below"),
    ];
    let above = vec![
        link("usr/share/linked", "usr/share/first"),
        link("usr/bin/linked", "usr/share/first"),
        link("etc/linked", "usr/share/linked"),
        dir("usr/share/becomes-dir"),
        file("usr/share/becomes-dir/.a", "in a directory"),
        file("usr/share/dots/.wh..a", ""),
        file("usr/share/dots/.wh.b", ""),
        file("usr/share/dots/.b", "above"),
        dir("usr/share/opaque"),
        file("usr/share/opaque/.wh..wh..opq", ""),
        file("usr/share/opaque/.b", "above"),
        file("usr/share/becomes-file", "a file"),
    ];
    let last = vec![file("usr/share/.wh.first", ""), link("usr/share/again", "usr/share/linked")];
    compared(&bench, &[labelled_system(), below, above, last], "rare", false, &String::new).await;
}

/// The tree has `/etc` below `/usr`, and an older libostree `/var` below `/usr/share`. A layer that removes these
/// directories removes more than in the archive, which is a warning.
#[tokio::test(flavor = "multi_thread")]
async fn content_that_disappears_with_a_directory_above_it_is_named() {
    let bench = Bench::new();
    let below = [labelled_system(), vec![file("etc/app", "app")]].concat();
    let above = [vec![file("usr/.wh..wh..opq", "")], labelled_system()].concat();
    let spec = bench.push(&stack(&[below, above]), "unpacked:usr");
    let pulled = try_pull_with(&spec, &bench.store("usr", None), None, complete()).await.unwrap();
    let named =
        |warning: &&String| warning.contains("removes the /usr of") && warning.contains("where ostree keeps /etc");
    assert_eq!(pulled.warnings.iter().filter(named).count(), 1, "{:?}", pulled.warnings);
}

#[tokio::test(flavor = "multi_thread")]
async fn random_plain_images_equal_what_others_unpack() {
    let bench = Bench::new();
    for seed in seeds() {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = rng.random_range(1..4);
        let mut items = vec![labelled_system()];
        items.extend((0..count).map(|at| random_layer(&mut rng, at + 1 == count)));
        // Removes /var, too, with an older libostree.
        items.iter_mut().for_each(|layer| layer.retain(|item| item.path != "usr/share/.wh..wh..opq"));
        let shown = || format!("PIVOT_SEED={seed}: {:#?}", &items[1..]).replace(&"0,\n".repeat(3), "");
        compared(&bench, &items, &format!("seed-{seed}"), false, &shown).await;
    }
}
