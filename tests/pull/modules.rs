//! Kernel modules in derived images: a delta pull leaves their content out, and still makes the commit that a complete
//! pull makes.

use std::fs;

use node_store::image::Kind;
use node_store::import::PullOptions;
use node_store::store::{BootedRepo, NodeStore};

use super::derived::{CONTEXTS, Labels, base, complete, with};
use super::fixture::{Image, Repo, listing, run};
use super::layers::{Item, What, file, item, link};
use super::plain::{labelled_system, of};
use super::tree::tree;
use super::{Bench, fsck, try_pull_with};

const MODULE: &str = "usr/lib/modules/6.1/kernel/net.ko";

/// A booted system that has none of the image's modules, nor its kubelet.
fn booted(bench: &Bench, name: &str) -> BootedRepo {
    let dir = bench.path(&format!("{name}-old"));
    tree(&dir, 2);
    fs::remove_file(dir.join("usr/share/deep/er").join("long-name-".repeat(20))).unwrap();
    let repo = Repo::create(&bench.path(&format!("{name}-booted")));
    let commit = repo.commit(&dir, "old");
    BootedRepo { path: repo.path, commit: commit.parse().ok() }
}

struct Pulls {
    delta: NodeStore,
    whole: NodeStore,
}

/// Pulls what is missing, then the rest, then all of it into another store: one commit.
async fn one_commit(bench: &Bench, image: &Image, name: &str) -> Pulls {
    let booted = booted(bench, name);
    let spec = bench.push(image, &format!("modules:{name}"));
    let delta = bench.store(&format!("{name}-delta"), Some(&booted));
    let first = try_pull_with(&spec, &delta, Some(&booted), PullOptions::default()).await.unwrap();
    let expected = PullOptions { expected: Some(first.commit), ..complete() };
    let rest = try_pull_with(&spec, &delta, Some(&booted), expected).await.unwrap();
    fsck(delta.repo_path());
    let whole = bench.store(&format!("{name}-whole"), None);
    let all = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    assert_eq!((&first.commit, &rest.commit), (&all.commit, &all.commit), "{name}: {first:?} {rest:?}");
    assert!(rest.complete && all.complete, "{name}");
    fsck(whole.repo_path());
    Pulls { delta, whole }
}

fn contexts(line: &str) -> Vec<Item> {
    vec![file("etc/selinux/test/contexts/files/file_contexts", &format!("{CONTEXTS}{line}"))]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_labels_modules_otherwise() {
    let module_type = "/usr/lib/modules(/.*)?\tsystem_u:object_r:modules_object_t:s0\n";
    let own_module = vec![file("usr/lib/modules/6.1/extra.ko", "a module of the layer")];
    for (name, labels, layers) in [
        ("relabelled", Labels::Own, vec![contexts(module_type)]),
        ("own-module", Labels::Own, vec![own_module, contexts(module_type)]),
        ("unlabelled", Labels::Missing, vec![vec![file("usr/share/x", "x")]]),
        ("other-lines", Labels::Own, vec![contexts("/usr/share/x\t--\tsystem_u:object_r:x_t:s0\n")]),
    ] {
        let bench = Bench::new();
        let pulls = one_commit(&bench, &with(base(&bench, labels), &layers), name).await;
        let all = listing(pulls.whole.repo_path(), "coreos/node-image");
        assert_eq!(all, listing(pulls.delta.repo_path(), "coreos/node-image"), "{name}");
        let line = all.lines().find(|line| line.ends_with(MODULE)).unwrap();
        let label = if name == "other-lines" || name == "unlabelled" { "usr_t" } else { "modules_object_t" };
        assert!(line.contains(label), "{name}: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hardlink_to_a_file_among_the_modules() {
    for (name, labels) in [("none", Labels::None), ("own", Labels::Own)] {
        let bench = Bench::new();
        let layers = [vec![link("usr/share/module", MODULE)]];
        let pulls = one_commit(&bench, &with(base(&bench, labels), &layers), name).await;
        let repo = format!("--repo={}", pulls.delta.repo_path().display());
        let expected = run("sha256sum", &[bench.path(&format!("tree-{labels:?}")).join(MODULE).to_str().unwrap()]);
        let out = bench.path("out");
        let out = out.to_str().unwrap();
        run("ostree", &["checkout", "-U", "--force-copy", &repo, "--subpath=/usr/share", "coreos/node-image", out]);
        let actual = run("sha256sum", &[&format!("{out}/module")]);
        assert_eq!(actual[..64], expected[..64], "{name}");
    }
}

/// Layers that remove, move or replace the modules below them, on an encapsulated commit and in a plain image.
#[tokio::test(flavor = "multi_thread")]
async fn modules_that_a_layer_removes_moves_or_replaces() {
    let whiteout = || file("usr/lib/.wh.modules", "");
    let (removed, moved, replaced) = (
        vec![whiteout()],
        vec![
            whiteout(),
            item("usr/lib/modules", What::Symlink("../share/modules".into())),
            link("usr/share/modules/6.1/vmlinuz", "usr/lib/modules/6.1/vmlinuz"),
        ],
        vec![
            file("usr/lib/modules/.wh.6.1", ""),
            file("usr/lib/modules/6.2/vmlinuz", "another kernel"),
            file("usr/lib/modules/6.2/kernel/net.ko", "another module"),
        ],
    );
    for (name, layer, kernel) in [
        ("removed", removed, None),
        ("moved", moved, Some("/usr/share/modules/6.1/vmlinuz")),
        ("replaced", replaced, Some("/usr/lib/modules/6.2/vmlinuz")),
    ] {
        let bench = Bench::new();
        for (kind, below) in [("derived", base(&bench, Labels::Own)), ("plain", of(&[labelled_system()]))] {
            let pulls = one_commit(&bench, &with(below, std::slice::from_ref(&layer)), &format!("{name}-{kind}")).await;
            let all = listing(pulls.whole.repo_path(), "coreos/node-image");
            assert_eq!(all, listing(pulls.delta.repo_path(), "coreos/node-image"), "{name} {kind}");
            let kernels: Vec<_> =
                all.lines().filter_map(|line| line.split(' ').find(|word| word.ends_with("/vmlinuz"))).collect();
            assert_eq!(kernels, kernel.into_iter().collect::<Vec<_>>(), "{name} {kind}: {all}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_commit_than_expected_leaves_the_ref() {
    let bench = Bench::new();
    let image = with(base(&bench, Labels::None), &[vec![file("usr/share/x", "x")]]);
    let spec = bench.push(&image, "modules:expected");
    let store = bench.store("store", None);
    let expected = PullOptions { expected: "ab".repeat(32).parse().ok(), ..complete() };
    let refused = try_pull_with(&spec, &store, None, expected).await.unwrap_err();
    assert!(refused.kind == Kind::Local && refused.message.contains(&"ab".repeat(32)), "{refused}");
    assert_eq!(store.resolve_ref().unwrap(), None);
}
