//! Derived images: plain layers on top of an encapsulated commit, compared with what ostree-ext makes of
//! them.

use std::fs;
use std::path::Path;

use node_store::image::Kind;
use node_store::import::{PullOptions, PulledImage};
use node_store::store::{BootedRepo, NodeStore, ObjectType};

use super::fixture::{Image, Repo, encapsulate, listing, run};
use super::layers::{Item, What, by_ostree_ext, difference, dir, file, item, layer, link, oracle};
use super::tree::{chunker, noise, tree};
use super::{Bench, failure, fsck, try_pull_with};

/// A small policy: libselinux wants the files, libostree only looks labels up.
pub const CONTEXTS: &str = "\
/.*\tsystem_u:object_r:default_t:s0
/\t-d\tsystem_u:object_r:root_t:s0
/usr(/.*)?\tsystem_u:object_r:usr_t:s0
/usr/bin(/.*)?\tsystem_u:object_r:bin_t:s0
/usr/bin/kubelet\t--\tsystem_u:object_r:kubelet_exec_t:s0
/usr/etc(/.*)?\tsystem_u:object_r:etc_t:s0
/usr/share/nolabel(/.*)?\t<<none>>
";

pub fn policy(dir: &Path, contexts: &str) {
    let base = dir.join("usr/etc/selinux");
    fs::create_dir_all(base.join("test/contexts/files")).unwrap();
    fs::create_dir_all(base.join("test/policy")).unwrap();
    fs::create_dir_all(base.join("test/active")).unwrap();
    fs::write(base.join("config"), "SELINUX=enforcing\nSELINUXTYPE=test\n").unwrap();
    fs::write(base.join("test/contexts/files/file_contexts"), contexts).unwrap();
    fs::write(base.join("test/policy/policy.31"), "no real policy").unwrap();
    fs::write(base.join("test/active/large"), noise(5000, 9)).unwrap();
}

/// The fixture's image with its tree labelled by its own policy, without one, or with one that the
/// tree was not labelled by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Labels {
    None,
    Own,
    Missing,
}

pub fn base(bench: &Bench, labels: Labels) -> Image {
    changed_base(bench, labels, "", &|_| {})
}

/// The same with a tree that was changed before it was committed; `name` tells such trees apart.
pub fn changed_base(bench: &Bench, labels: Labels, name: &str, change: &dyn Fn(&Path)) -> Image {
    let path = bench.path(&format!("tree-{labels:?}{name}"));
    if !path.exists() {
        tree(&path, 1);
        // The content of this one is in no commit.
        fs::remove_file(path.join("usr/share/deep/er").join("long-name-".repeat(20))).unwrap();
        if labels != Labels::None {
            // libostree 2022.7 appends a new label after attributes that sort behind it.
            rustix::fs::lremovexattr(path.join("usr/share"), "trusted.note").unwrap();
            policy(&path, CONTEXTS);
        }
        change(&path);
    }
    let repo = format!("--repo={}", bench.repo.path.display());
    let tree = format!("--tree=dir={}", path.display());
    let policy = format!("--selinux-policy={}", path.display());
    let mut args = vec!["commit", &repo, "-b", "base", &tree, "-s", "base"];
    if labels == Labels::Own {
        args.push(&policy);
    }
    let commit = run("ostree", &args).trim().to_owned();
    encapsulate(&bench.repo, &commit, &chunker, 1)
}

pub fn complete() -> PullOptions {
    PullOptions { complete: true, ..PullOptions::default() }
}

pub fn with(mut image: Image, layers: &[Vec<Item>]) -> Image {
    image.layers.extend(layers.iter().map(|items| layer(items)));
    image
}

/// Pulls with both importers, into `store` and into a repo beside it, and compares. Returns the result of the agent's importer.
pub async fn compared(bench: &Bench, oracle: &str, image: &Image, name: &str) -> PulledImage {
    let spec = bench.push(image, &format!("derived:{name}"));
    let store = bench.store(name, None);
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let theirs = by_ostree_ext(oracle, &spec, &bench.path(&format!("{name}-oracle"))).unwrap();
    let ours = listing(store.repo_path(), "coreos/node-image");
    assert!(ours == theirs, "{name}:\n{}", difference(&ours, &theirs));
    pulled
}

pub fn capability() -> Vec<(String, Vec<u8>)> {
    let value = vec![1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![("security.capability".into(), value)]
}

/// Everything at once that both importers take.
pub fn layers() -> Vec<Vec<Item>> {
    let long = format!("usr/share/{}", "deep/".repeat(30));
    vec![
        vec![
            dir("./"),
            dir("etc/"),
            file("etc/kubernetes.conf", "kube"),
            Item { xattrs: capability(), ..item("usr/bin/newtool", What::File(noise(900_000, 3), 0o4755)) },
            Item { owner: (70_000, 80), ..file("usr/share/new/owned", "owned") },
            link("usr/bin/newtool2", "usr/bin/newtool"),
            link("etc/alias.conf", "etc/kubernetes.conf"),
            link("usr/share/alias.conf", "./etc/kubernetes.conf"),
            item("usr/bin/newlink", What::Symlink("..//bin/newtool".into())),
            item("usr/bin/farlink", What::Symlink("y/".repeat(80))),
            file("usr/bin/.wh.ping", ""),
            file("usr/share/.wh.empty", ""),
            file(&format!("{long}file"), "long"),
            file("usr/share/nolabel/x", "x"),
            file("usr/share/ünïcode", "u"),
            dir("run/"),
            file("run/secret", "no"),
            dir("tmp"),
            dir("opt"),
            file("opt/app/one", "1"),
            file("opt/app/two", "2"),
            file("root/.bashrc", "no"),
            item("dev/null", What::Device),
            file("var/lib/app/data", "data"),
            file("usr/lib/modules/6.1/extra.ko", "module"),
            file("usr/share/zero", ""),
            item("usr/share/strict", What::Dir(0o1700)),
            file("usr/share/strict/sub/new", "clobbers the mode above"),
        ],
        vec![
            // A file where a directory was, and the other way round; a directory emptied and refilled.
            file("usr/share/deep", "was a directory"),
            // Older libostree needs the whiteout.
            file("usr/bin/.wh.bash", ""),
            dir("usr/bin/bash"),
            file("usr/bin/bash/inside", "was a file"),
            dir("usr/share/new"),
            file("usr/share/new/.wh..wh..opq", ""),
            file("usr/share/new/fresh", "fresh"),
            file("etc/.wh.alias.conf", ""),
            file("etc/app/app.conf", "replaced"),
            item("usr/share/stable", What::Symlink("x".into())),
            // No effect on what exists.
            item("usr/share", What::Dir(0o700)),
            file("usr/bin/.wh.nosuch", ""),
            file("usr/bin/kubelet", "a small kubelet"),
        ],
        vec![file("usr/bin/kubelet", "a third kubelet"), file("usr/bin/.wh.bash", "")],
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn derived_images_equal_those_of_ostree_ext() {
    let bench = Bench::new();
    let oracle = oracle();
    for labels in [Labels::None, Labels::Own, Labels::Missing] {
        let base = base(&bench, labels);
        let base_commit = base.commit.clone();
        let pulled = compared(&bench, &oracle, &with(base, &layers()), &format!("{labels:?}").to_lowercase()).await;
        println!("{labels:?}: {pulled:?}");
        assert!(pulled.complete && pulled.commit.to_string() != base_commit);
        let text = pulled.warnings.join("\n");
        for words in ["/opt (3)", "/run (1)", "/root (1)"] {
            assert!(text.contains(words), "{text}");
        }
        assert_eq!(text.contains("relabelled"), labels == Labels::Missing, "{text}");
        let repo = bench.path(&format!("{labels:?}").to_lowercase()).join("repo");
        let repo = format!("--repo={}", repo.display());
        let show = |key: &str| run("ostree", &["show", &repo, "--print-metadata-key", key, &pulled.commit.to_string()]);
        assert!(show("ostree.manifest-digest").contains(&pulled.image.digest.to_string()));
        assert!(show("node-image-pivot.base-commit").contains(&base_commit));
        assert!(show("ostree.manifest").contains("schemaVersion"));
        let diff = run("ostree", &["diff", &repo, &base_commit, "coreos/node-image"]);
        assert!(diff.contains("/usr/bin/newtool") && diff.contains("D    /usr/bin/ping"), "{diff}");
        let out = bench.path(&format!("out-{labels:?}"));
        run("ostree", &["checkout", &repo, "coreos/node-image", out.to_str().unwrap()]);
        assert_eq!(fs::read(out.join("usr/bin/newtool2")).unwrap(), noise(900_000, 3));
        assert_eq!(fs::read_to_string(out.join("usr/bin/kubelet")).unwrap(), "a third kubelet");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_may_bring_its_own_policy() {
    let bench = Bench::new();
    let changed = CONTEXTS.replace("bin_t", "tool_t");
    let layers = [vec![
        file("etc/selinux/test/contexts/files/file_contexts", &changed),
        item("usr/bin/newtool", What::File(noise(600_000, 4), 0o755)),
    ]];
    let pulled = compared(&bench, &oracle(), &with(base(&bench, Labels::Own), &layers), "policy").await;
    assert!(pulled.warnings.iter().any(|line| line.contains("relabelled")), "{:?}", pulled.warnings);
    let repo = bench.path("policy").join("repo");
    let repo = format!("--repo={}", repo.display());
    let shown = run("ostree", &["ls", "-X", &repo, "coreos/node-image", "/usr/bin/newtool"]);
    assert!(shown.contains("security.selinux"), "{shown}");
    // Pulled again after the store forgot about it: the same commit, of what is there.
    fs::remove_file(bench.path("policy").join("pulled.json")).unwrap();
    let store = NodeStore::open(&bench.path("policy")).unwrap();
    let again = try_pull_with(&pulled.image.pinned.to_string(), &store, None, complete()).await.unwrap();
    assert_eq!((again.commit, again.bytes_fetched, again.objects_written), (pulled.commit, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_changed_behind_their_hardlinks() {
    let bench = Bench::new();
    // What a build in a container makes of a change to a file with other names: the object changed, and
    // its names are links to it.
    let base = base(&bench, Labels::Own);
    let repo = bench.repo.path.to_str().unwrap();
    let shown = run("ostree", &["ls", "-C", "--repo", repo, &base.commit, "/usr/share/stable"]);
    let id = shown.split_whitespace().nth(4).unwrap();
    let object = format!("sysroot/ostree/repo/objects/{}/{}.file", &id[..2], &id[2..]);
    let layers = [vec![
        dir("sysroot/ostree/repo"),
        file(&object, "changed"),
        link("usr/share/stable", &object),
        link("usr/share/second", &object),
    ]];
    compared(&bench, &oracle(), &with(base, &layers), "sysroot").await;
    // Links into lower layers, and to the commit's own objects: ostree-ext refuses these.
    let layers = [
        vec![file("usr/share/first", "first")],
        vec![
            file("usr/share/.wh.first", ""),
            link("usr/share/moved", "usr/share/first"),
            link("usr/bin/kubelet2", "/usr/bin/kubelet"),
            link("usr/share/again", &object),
        ],
    ];
    let spec = bench.push(&with(self::base(&bench, Labels::None), &layers), "derived:links");
    let store = bench.store("links", None);
    // The object's name is that of the labelled commit; here it is another one.
    let told = failure(&spec, &store).await;
    assert!(told.kind == Kind::BadFormat && told.message.contains(id), "{told}");
    let spec = bench.push(&with(self::base(&bench, Labels::Own), &layers), "derived:links2");
    let store = bench.store("links2", None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let repo = format!("--repo={}", store.repo_path().display());
    assert_eq!(run("ostree", &["cat", &repo, "coreos/node-image", "/usr/share/moved"]), "first");
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(!all.contains("/usr/share/first"));
    let sum = |path: &str| {
        let line = all.lines().find(|line| line.ends_with(path)).unwrap();
        line.split_whitespace().nth(4).unwrap().to_owned()
    };
    assert_eq!(sum("/usr/share/again"), sum("/usr/share/stable"));
    assert_ne!(sum("/usr/bin/kubelet2"), sum("/usr/bin/kubelet"), "another path, another label");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_booted_system_lacks_of_a_derived_image() {
    let bench = Bench::new();
    let base = base(&bench, Labels::Own);
    let (base_commit, image) = (base.commit.clone(), with(base, &layers()));
    let spec = bench.push(&image, "derived:delta");
    let booted_repo = Repo::create(&bench.path("booted"));
    let (booted_path, source) = (booted_repo.path.to_str().unwrap(), bench.repo.path.to_str().unwrap());
    run("ostree", &["pull-local", "--repo", booted_path, source, &base_commit]);
    let booted = BootedRepo { path: booted_repo.path.clone(), commit: base_commit.parse().ok() };
    let store = bench.store("delta", Some(&booted));
    let pulled = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
    assert_eq!(pulled.layers_fetched, 3, "only the plain ones: {pulled:?}");
    assert!(!pulled.complete, "the module of the first layer was left out");
    let repo = format!("--repo={}", store.repo_path().display());
    let id_of = |path: &str| {
        let shown = run("ostree", &["ls", "-C", &repo, "coreos/node-image", path]);
        shown.split_whitespace().nth(4).unwrap().parse().unwrap()
    };
    let kubelet = id_of("/usr/bin/kubelet");
    assert!(store.has(&kubelet, ObjectType::File));
    let mine = store.content_objects().unwrap();
    assert_eq!(mine.len() as u64, pulled.objects_written - 4, "what later layers replaced or hid was removed again");
    // Later: the rest, and it is the commit that a complete import gives.
    let rest = try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
    assert!(rest.complete && rest.layers_fetched == 1 && rest.objects_written == 1, "{rest:?}");
    let whole = bench.store("whole", None);
    let pulled = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    assert_eq!(rest.commit, pulled.commit);
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), listing(whole.repo_path(), "coreos/node-image"));
}

/// Whiteouts and opaque directories before and after the entries they stand beside, and of odd things.
#[tokio::test(flavor = "multi_thread")]
async fn whiteouts_in_all_positions() {
    let bench = Bench::new();
    let below = vec![
        file("usr/share/a/one", "1"),
        file("usr/share/a/two", "2"),
        file("usr/share/b/one", "1"),
        file("usr/share/b/sub/deep", "d"),
        file("usr/share/c/x/y/z", "z"),
        file("usr/share/d/keep", "k"),
        file("usr/share/e/one", "1"),
        file("usr/share/zz name with spaces", "s"),
        item("usr/share/linked", What::Symlink("a".into())),
        file("etc/gone/conf", "c"),
        file("var/gone/data", "d"),
    ];
    let above = vec![
        // Opaque after what the same layer has in it, and before.
        file("usr/share/a/three", "3"),
        file("usr/share/a/.wh..wh..opq", ""),
        file("usr/share/b/.wh..wh..opq", ""),
        file("usr/share/b/three", "3"),
        // A directory removed and made again, with a new entry.
        file("usr/share/.wh.c", ""),
        item("usr/share/c", What::Dir(0o700)),
        dir("usr/share/c/x"),
        file("usr/share/c/x/new", "n"),
        file("usr/share/d/.wh.absent", ""),
        file("usr/share/absent/.wh.absent", ""),
        file("usr/share/e/.wh..wh.plnk", ""),
        file("usr/share/.wh.zz name with spaces", ""),
        file("usr/share/.wh.linked", ""),
        file("etc/gone/.wh..wh..opq", ""),
        file("etc/gone/fresh", "f"),
        file("var/gone/.wh.data", ""),
        // At the top, where nothing of the kind can be.
        file(".wh..wh..opq", ""),
        file(".wh.opt", ""),
    ];
    compared(&bench, &oracle(), &with(base(&bench, Labels::None), &[below.clone(), above.clone()]), "white").await;
    let store = NodeStore::open(&bench.path("white")).unwrap();
    let all = listing(store.repo_path(), "coreos/node-image");
    for gone in ["/a/one", "/b/one", "/b/sub", "/c/x/y", "spaces", "/linked", "gone/conf", "gone/data", ".wh."] {
        assert!(!all.contains(gone), "{gone}: {all}");
    }
    for there in ["/a/three", "/b/three", "/c/x/new", "/d/keep", "/e/one", "gone/fresh", "/usr/bin/bash"] {
        assert!(all.contains(there), "{there}: {all}");
    }
    // In whatever order the entries come, it is the same tree.
    let mut turned = above;
    turned.reverse();
    let image = with(base(&bench, Labels::None), &[below, turned]);
    let store = bench.store("turned", None);
    try_pull_with(&bench.push(&image, "derived:turned"), &store, None, complete()).await.unwrap();
    assert_eq!(listing(store.repo_path(), "coreos/node-image"), all);
}

/// ostree-ext refuses a layer with devices; what runs from such an image makes its own.
#[tokio::test(flavor = "multi_thread")]
async fn devices_are_left_out_with_a_warning() {
    let bench = Bench::new();
    let layers =
        [vec![item("usr/share/null", What::Device), item("usr/share/pipe", What::Fifo), file("usr/share/x", "x")]];
    let spec = bench.push(&with(base(&bench, Labels::None), &layers), "derived:devices");
    let store = bench.store("devices", None);
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    let text = pulled.warnings.join("\n");
    assert!(text.contains("device /usr/share/null (1)") && text.contains("fifo /usr/share/pipe (1)"), "{text}");
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(all.contains("/usr/share/x") && !all.contains("/usr/share/null") && !all.contains("/usr/share/pipe"));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_derived_layers_are_refused() {
    let bench = Bench::new();
    for (name, item, words) in [
        ("up", file("usr/x", ""), "escapes"),
        ("nothing", link("usr/x", "usr/nosuch"), "/usr/nosuch"),
        ("directory", link("usr/x", "usr/share"), "hardlink"),
        ("left-out", link("usr/x", "opt/y"), "/opt"),
        ("whiteout", file("usr/.wh.", ""), "whiteout without a name"),
    ] {
        let mut layer = layer(&[item]);
        let spoil = |layer: &mut Vec<u8>, path: &[u8]| {
            let mut header = tar::Header::from_byte_slice(&layer[..512]).clone();
            header.as_old_mut().name[..path.len()].copy_from_slice(path);
            header.set_cksum();
            layer[..512].copy_from_slice(header.as_bytes());
        };
        if name == "up" {
            spoil(&mut layer.tar, b"usr/../../etc/x");
        }
        let mut image = base(&bench, Labels::None);
        image.layers.push(layer);
        let spec = bench.push(&image, &format!("bad:{name}"));
        let told = failure(&spec, &bench.store(name, None)).await;
        assert_eq!(told.kind, Kind::BadFormat, "{name}: {told}");
        assert!(told.message.contains(words) && told.message.contains("layer 5"), "{name}: {told}");
    }
}
