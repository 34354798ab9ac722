//! Plain layers that builders rarely write, and bases that few machines have.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::derived::{CONTEXTS, Labels, base, changed_base, compared, complete, with};
use super::fixture::{Image, RawLayer, listing, run};
use super::layers::{Item, What, dir, file, item, link, oracle, raw, raw_layer};
use super::plain::{self, labelled_system, of, policy, system};
use super::{Bench, fsck, try_pull_with};
use node_store::import::PulledImage;
use node_store::store::NodeStore;

async fn taken(bench: &Bench, image: &Image, name: &str) -> (NodeStore, PulledImage) {
    let store = bench.store(name, None);
    let pulled = try_pull_with(&bench.push(image, &format!("odd:{name}")), &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    (store, pulled)
}

fn cat(store: &NodeStore, path: &str) -> String {
    run("ostree", &["cat", &format!("--repo={}", store.repo_path().display()), "coreos/node-image", path])
}

fn object_of(bench: &Bench, commit: &str, path: &str) -> String {
    let shown = run("ostree", &["ls", "-C", "--repo", bench.repo.path.to_str().unwrap(), commit, path]);
    let id = shown.split_whitespace().nth(4).unwrap();
    format!("sysroot/ostree/repo/objects/{}/{}.file", &id[..2], &id[2..])
}

/// A changed file, its name in the repo's directory and a third name, as one file in every order.
#[tokio::test(flavor = "multi_thread")]
async fn an_objects_name_may_itself_be_a_hardlink() {
    let bench = Bench::new();
    let base = base(&bench, Labels::None);
    let object = object_of(&bench, &base.commit, "/usr/share/stable");
    let changed = || file("usr/share/stable", "changed");
    for (name, layer) in [
        ("chain", vec![changed(), link(&object, "usr/share/stable"), link("usr/share/third", &object)]),
        ("link-first", vec![link(&object, "usr/share/stable"), changed(), link("usr/share/third", &object)]),
        (
            "symlink",
            vec![
                changed(),
                item(&object, What::Symlink("stable".into())),
                item("usr/share/third", What::Hardlink(object.clone())),
            ],
        ),
    ] {
        let (store, _) = taken(&bench, &with(base.clone(), &[layer]), name).await;
        let all = listing(store.repo_path(), "coreos/node-image");
        match name {
            "symlink" => assert!(all.contains("/usr/share/third -> stable"), "{all}"),
            _ => assert_eq!(cat(&store, "/usr/share/third"), "changed", "{name}"),
        }
    }
    let fifo = vec![item(&object, What::Fifo), link("usr/share/third", &object)];
    let spec = bench.push(&with(base, &[fifo]), "odd:fifo-object");
    let told = super::failure(&spec, &bench.store("fifo-object", None)).await;
    assert!(told.message.contains("usr/share/third is a hardlink to"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_directory_link_is_named() {
    let bench = Bench::new();
    let links = |path: &Path| symlink("lib", path.join("usr/lib64")).unwrap();
    let base = changed_base(&bench, Labels::None, "-links", &links);
    let linked = [labelled_system(), vec![item("usr/lib64", What::Symlink("lib".into()))]].concat();
    for (name, bottom, layer) in [("links", base, "layer 5"), ("plain-links", of(&[linked]), "layer 1")] {
        let image = with(bottom, &[vec![file("usr/lib64/new.so", "new"), file("usr/share/x", "x")]]);
        let (store, pulled) = taken(&bench, &image, name).await;
        assert_eq!(cat(&store, "/usr/lib64/new.so"), "new");
        let told = pulled.warnings.join("\n");
        assert!(told.contains("/usr/lib64 replaces a symlink") && told.contains(layer), "{told}");
        assert_eq!(pulled.warnings.len(), 1, "{told}");
    }
}

/// ostree-ext ignores the mode and the owner of a directory that the layers below have.
#[tokio::test(flavor = "multi_thread")]
async fn ignored_modes_and_owners_of_directories_are_named() {
    let bench = Bench::new();
    let dirs = |mode| (0..14).map(move |at| item(&format!("usr/share/many/{at:02}"), What::Dir(mode)));
    let below = vec![dir("etc/secret"), item("usr/share/kept", What::Dir(0o700)), dir("usr/share/made")];
    let above = vec![
        item("etc/secret", What::Dir(0o700)),
        Item { owner: (7, 8), ..dir("usr/bin") },
        // Equal, without an entry, and removed before.
        item("usr/share", What::Dir(0o755)),
        file("usr/share/kept/file", "x"),
        file("usr/share/.wh.made", ""),
        item("usr/share/made", What::Dir(0o700)),
    ];
    let stack = [[labelled_system(), below, dirs(0o755).collect()].concat(), above, dirs(0o750).collect()];
    let pulled = plain::compared(&bench, &oracle(), &of(&stack), "metadata").await;
    let all = listing(&bench.path("metadata").join("repo"), "coreos/node-image");
    for (path, mode) in [("/usr/etc/secret", "d00755"), ("/usr/share/kept", "d00700"), ("/usr/share/made", "d00700")] {
        assert!(all.lines().any(|line| line.ends_with(path) && line.starts_with(mode)), "{path}: {all}");
    }
    let ignored = |path: &str, rights: &str| {
        let line = format!("its {rights} for the directory /{path} are ignored: the directory keeps mode 0755 and");
        pulled.warnings.iter().filter(|warning| warning.contains(&line)).count()
    };
    assert_eq!(ignored("usr/etc/secret", "mode 0700 and owner 0:0"), 1, "{:?}", pulled.warnings);
    assert_eq!(ignored("usr/bin", "mode 0755 and owner 7:8"), 1, "{:?}", pulled.warnings);
    assert_eq!(ignored("usr/share/many/09", "mode 0750 and owner 0:0"), 1, "{:?}", pulled.warnings);
    assert_eq!(pulled.warnings.len(), 12, "{:?}", pulled.warnings);
    assert!(pulled.warnings[11].ends_with("; and 4 more such warnings"), "{:?}", pulled.warnings);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_with_a_size_and_files_linked_to_themselves() {
    let bench = Bench::new();
    let with_size = |path: &[u8], kind: u8| {
        let mut entry = raw(path, kind, b"", b"", &[]);
        let mut header = tar::Header::from_byte_slice(&entry[..512]).clone();
        header.set_size(4096);
        header.set_cksum();
        entry[..512].copy_from_slice(header.as_bytes());
        entry
    };
    let layer: RawLayer = raw_layer(&[
        with_size(b"usr/share/fifo", b'6'),
        with_size(b"usr/share/char", b'3'),
        with_size(b"usr/share/block", b'4'),
        raw(b"usr/share/after", b'0', b"", b"content", &[]),
        raw(b"usr/share/after", b'1', b"usr/share/after", b"", &[]),
        raw(b"usr/bin/bash", b'1', b"usr/bin/bash", b"", &[]),
    ]);
    let bash = vec![item("usr/bin/bash", What::File(vec![b'b'; 3000], 0o755))];
    for (name, mut image) in [("sizes", base(&bench, Labels::None)), ("plain-sizes", of(&[labelled_system(), bash]))] {
        image.layers.push(layer.clone());
        let (store, pulled) = taken(&bench, &image, name).await;
        assert_eq!(cat(&store, "/usr/share/after"), "content");
        assert_eq!(cat(&store, "/usr/bin/bash"), "b".repeat(3000));
        assert!(pulled.warnings[0].contains("3 entries cannot be part"), "{:?}", pulled.warnings);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policys_config_may_be_a_symlink() {
    let bench = Bench::new();
    for (name, target) in [("relative", "../default/selinux"), ("absolute", "/etc/default/selinux")] {
        let moved = |path: &Path| {
            let (config, etc) = (path.join("usr/etc/selinux/config"), path.join("usr/etc/default"));
            fs::create_dir_all(&etc).unwrap();
            fs::rename(&config, etc.join("selinux")).unwrap();
            symlink(target, &config).unwrap();
        };
        // libostree cannot label such a tree itself where it is not the root.
        let base = changed_base(&bench, Labels::Missing, name, &moved);
        let mut plain = [system(), policy("test", CONTEXTS)].concat();
        for item in plain.iter_mut().filter(|item| item.path == "etc/selinux/config") {
            item.path = "etc/default/selinux".into();
        }
        plain.push(item("etc/selinux/config", What::Symlink(target.into())));
        for (bottom, name) in [(base, name.to_owned()), (of(&[plain]), format!("plain-{name}"))] {
            let (store, _) = taken(&bench, &with(bottom, &[vec![file("usr/bin/new", "x")]]), &name).await;
            let all = listing(store.repo_path(), "coreos/node-image");
            let line = all.lines().find(|line| line.ends_with("/usr/bin/new")).unwrap();
            assert!(line.contains("bin_t"), "{name}: {line}");
        }
    }
}

/// If the root will be an overlay, content at the top is part of the tree, and an opaque root hides all below.
#[tokio::test(flavor = "multi_thread")]
async fn content_at_the_top_of_a_composefs_base() {
    let bench = Bench::new();
    for (name, config) in [("verity", "[composefs]\nenabled=verity\n"), ("transient", "[root]\ntransient-ro=true\n")] {
        let composefs = |path: &Path| {
            fs::create_dir_all(path.join("usr/lib/ostree")).unwrap();
            fs::write(path.join("usr/lib/ostree/prepare-root.conf"), config).unwrap();
        };
        let base = changed_base(&bench, Labels::None, name, &composefs);
        let (store, _) = taken(&bench, &with(base.clone(), &[vec![file("newtop/x", "x")]]), name).await;
        assert_eq!(cat(&store, "/newtop/x"), "x");
        let opaque = vec![file(".wh..wh..opq", ""), file("usr/share/only", "this")];
        let (store, _) = taken(&bench, &with(base, &[opaque]), &format!("{name}-opaque")).await;
        let all = listing(store.repo_path(), "coreos/node-image");
        assert!(all.contains("/usr/share/only") && !all.contains("/usr/bin/bash"), "{all}");
    }
    // A plain image may have content at the top of any tree.
    let without = labelled_system().into_iter().filter(|item| item.path != "usr/bin/bash");
    let opaque = [vec![file(".wh..wh..opq", ""), file("usr/share/only", "this")], without.collect()].concat();
    let (store, _) = taken(&bench, &of(&[labelled_system(), vec![file("newtop/x", "x")], opaque]), "plain").await;
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(all.contains("/usr/share/only") && !all.contains("/usr/bin/bash") && !all.contains("newtop"), "{all}");
}

/// The layer hides the policy: what it brings keeps the labels that it was read with, parents included.
#[tokio::test(flavor = "multi_thread")]
async fn parents_have_labels_when_the_policy_is_hidden() {
    let bench = Bench::new();
    let layer: Vec<Item> = vec![
        file("etc/.wh.selinux", ""),
        file("usr/share/new/deep/x", "x"),
        dir("usr/share/own"),
        file("usr/bin/t/x", ""),
    ];
    compared(&bench, &oracle(), &with(base(&bench, Labels::Own), &[layer]), "hidden").await;
    let all = listing(&bench.path("hidden").join("repo"), "coreos/node-image");
    for path in ["/usr/share/new", "/usr/share/new/deep", "/usr/bin/t"] {
        let line = all.lines().find(|line| line.ends_with(path)).unwrap();
        assert!(line.contains("security.selinux") || line.contains("object_r"), "{line}");
    }
}
