//! Plain images: layers without an encapsulated commit below them. ostree-ext 0.15.3 imports only the same layers over an
//! encapsulated commit of an almost empty tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use node_store::image::Kind;
use node_store::import::PulledImage;
use node_store::store::{BootedRepo, NodeStore, ObjectType};
use serde_json::{Value, json};

use super::derived::{CONTEXTS, capability, complete, layers};
use super::fixture::{Image, RawLayer, blob, encapsulate, fsck, listing, run, write_index};
use super::layers::{Item, What, by_ostree_ext, difference, dir, file, item, layer, link, oracle, raw, raw_layer};
use super::tree::{chunker, noise};
use super::{Bench, failure, try_pull, try_pull_with};

const PREPARE_ROOT: &str = "[composefs]\nenabled = yes\n";

/// The files of a policy, as a layer has them.
pub fn policy(kind: &str, contexts: &str) -> Vec<Item> {
    let base = format!("etc/selinux/{kind}");
    vec![
        file("etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=test\n"),
        file(&format!("{base}/contexts/files/file_contexts"), contexts),
        file(&format!("{base}/policy/policy.31"), "not a real policy"),
    ]
}

/// The first layer of a small system, without a policy.
pub fn system() -> Vec<Item> {
    let dirs =
        ["./", "boot/", "etc/", "proc/", "sysroot/", "usr/", "usr/bin/", "usr/lib/", "usr/lib/ostree/", "usr/share/"];
    let mut items: Vec<Item> = dirs.into_iter().map(dir).collect();
    items.extend([
        item("bin", What::Symlink("usr/bin".into())),
        item("ostree", What::Symlink("sysroot/ostree".into())),
        file("usr/lib/ostree/prepare-root.conf", PREPARE_ROOT),
        file("usr/lib/os-release", "ID=test\n"),
        item("usr/lib/systemd/systemd", What::File(noise(1000, 1), 0o755)),
        item("usr/bin/bash", What::File(noise(3000, 2), 0o755)),
        item("usr/bin/kubelet", What::File(noise(700_000, 3), 0o755)),
        Item { xattrs: capability(), ..item("usr/bin/ping", What::File(b"ping".to_vec(), 0o4755)) },
        file("usr/lib/modules/6.1/vmlinuz", "kernel"),
        file("usr/share/stable", "stable"),
        file("usr/share/empty/zero", ""),
        file("etc/app/app.conf", "version = 1\n"),
        file("opt/tool/file", "in /opt"),
    ]);
    items
}

/// The same with a policy.
pub fn labelled_system() -> Vec<Item> {
    [system(), policy("test", CONTEXTS)].concat()
}

pub fn plain(layers: Vec<RawLayer>) -> Image {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Image {
        commit: String::new(),
        layers,
        final_layer: 0,
        architecture: architecture.to_owned(),
        labels: BTreeMap::from([("containers.bootc".to_owned(), "1".to_owned())]),
    }
}

pub fn of(layers: &[Vec<Item>]) -> Image {
    plain(layers.iter().map(|items| layer(items)).collect())
}

/// An encapsulated commit whose only file lets ostree-ext accept content in any top-level directory.
pub fn almost_empty(bench: &Bench) -> Image {
    let tree = bench.path("almost-empty");
    if !tree.exists() {
        fs::create_dir_all(tree.join("usr/lib/ostree")).unwrap();
        fs::write(tree.join("usr/lib/ostree/prepare-root.conf"), PREPARE_ROOT).unwrap();
    }
    let commit = bench.repo.commit(&tree, "almost-empty");
    encapsulate(&bench.repo, &commit, &chunker, 1)
}

/// Pulls the layers as a plain image, and has ostree-ext import them over [`almost_empty`].
pub async fn compared(bench: &Bench, oracle: &str, image: &Image, name: &str) -> PulledImage {
    let store = bench.store(name, None);
    let spec = bench.push(image, &format!("plain:{name}"));
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let mut other = almost_empty(bench);
    other.layers.extend(image.layers.iter().cloned());
    let theirs = bench.push(&other, &format!("over-empty:{name}"));
    let theirs = by_ostree_ext(oracle, &theirs, &bench.path(&format!("{name}-oracle"))).unwrap();
    let ours = listing(store.repo_path(), "coreos/node-image");
    assert!(ours == theirs, "{name}:\n{}", difference(&ours, &theirs));
    pulled
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_images_equal_those_of_ostree_ext() {
    let bench = Bench::new();
    let oracle = oracle();
    let changed = policy("test", &CONTEXTS.replace("bin_t", "tool_t"));
    for (name, mut stack) in [
        ("unlabelled", vec![system()]),
        ("labelled", vec![labelled_system()]),
        ("late-policy", vec![system(), policy("test", CONTEXTS)]),
        (
            "two-policies",
            vec![system(), policy("other", &CONTEXTS.replace("_t:s0", "_o:s0")), policy("test", CONTEXTS)],
        ),
        ("changed-policy", vec![labelled_system(), changed]),
    ] {
        stack.extend(layers());
        let pulled = compared(&bench, &oracle, &of(&stack), name).await;
        assert!(pulled.complete, "{pulled:?}");
        let repo = format!("--repo={}", bench.path(name).join("repo").display());
        let show = |key: &str| run("ostree", &["show", &repo, "--print-metadata-key", key, &pulled.commit.to_string()]);
        assert!(show("ostree.manifest-digest").contains(&pulled.image.digest.to_string()));
        assert!(show("ostree.manifest").contains("schemaVersion"));
        assert!(show("ostree.container.image-config").contains("containers.bootc"));
        let log = run("ostree", &["log", &repo, "coreos/node-image"]);
        assert!(!log.contains("Parent:"), "{log}");
        let all = listing(&bench.path(name).join("repo"), "coreos/node-image");
        for path in
            [" /bin -> usr/bin", " /ostree -> sysroot/ostree", " /sysroot", " /opt/tool/file", " /usr/etc/app/app.conf"]
        {
            assert!(all.contains(path), "{path}: {all}");
        }
        assert_eq!(all.contains("kubelet_exec_t"), name != "unlabelled");
        assert!(!all.contains("_o:s0"), "the config names the other policy");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_a_build_leaves_are_removed_and_pax_paths_are_moved() {
    let bench = Bench::new();
    let mut image = of(&[labelled_system()]);
    image.layers.push(layer(&[
        item("etc/resolv.conf", What::Symlink("../run/systemd/resolve/stub-resolv.conf".into())),
        file("etc/hosts", ""),
    ]));
    image.layers.push(raw_layer(&[
        raw(b"etc/resolv.conf", b'0', b"", b"", &[]),
        raw(b"./etc/hostname", b'0', b"", b"", &[]),
        raw(b"etc/named", b'1', b"etc/hostname", b"", &[]),
        raw(b"x", b'0', b"", b"by a PAX path", &[(b"path", b"etc/pax.conf")]),
        raw(b"usr/share/linked", b'1', b"x", b"", &[(b"linkpath", b"etc/pax.conf")]),
        raw(b"etc/below", b'1', b"x", b"", &[(b"linkpath", b"./etc/app/app.conf")]),
    ]));
    image.layers.push(raw_layer(&[
        raw(b"etc/empty", b'0', b"", b"", &[]),
        raw(b"etc/resolv.conf", b'1', b"etc/empty", b"", &[]),
    ]));
    let spec = bench.push(&image, "plain:left");
    let store = bench.store("left", None);
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    fsck(store.repo_path());
    let all = listing(store.repo_path(), "coreos/node-image");
    assert!(all.contains("/usr/etc/resolv.conf -> ../run/systemd/resolve/stub-resolv.conf"), "{all}");
    assert!(all.contains("/usr/etc/hosts") && !all.contains("/usr/etc/hostname"), "{all}");
    assert!(
        all.contains("/usr/etc/named") && all.contains("/usr/etc/empty"),
        "hardlinks and their targets stay: {all}"
    );
    let cat = |path: &str| {
        run("ostree", &["cat", &format!("--repo={}", store.repo_path().display()), "coreos/node-image", path])
    };
    assert_eq!(cat("/usr/etc/pax.conf"), "by a PAX path");
    assert_eq!(cat("/usr/share/linked"), "by a PAX path");
    assert_eq!(cat("/usr/etc/below"), "version = 1\n");
}

/// The booted repo has an older image. Its policy is a guess: the commit is that of a pull without a booted repo.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_image_is_the_same_commit_on_every_system() {
    let bench = Bench::new();
    let booted_store = bench.store("booted", None);
    let old = bench.push(&of(&[labelled_system()]), "plain:old");
    let old = try_pull_with(&old, &booted_store, None, complete()).await.unwrap();
    let booted = BootedRepo { path: booted_store.repo_path().to_owned(), commit: Some(old.commit) };
    let update = vec![
        item("usr/bin/kubelet", What::File(noise(600_000, 4), 0o755)),
        file("usr/lib/modules/6.2/vmlinuz", "newer kernel"),
        file("usr/share/new", "new"),
    ];
    let relabels = [update.clone(), policy("test", &CONTEXTS.replace("bin_t", "tool_t"))].concat();
    // A policy that has no label for a path for which the booted one has a label.
    let without = format!("{CONTEXTS}/usr/share/dir(/.*)?\t<<none>>\n");
    let unlabels = [update.clone(), vec![file("usr/share/dir/x", "x")], policy("test", &without)].concat();
    // A policy with another label for kernel modules, which a delta pull then needs.
    let modules = format!("{CONTEXTS}/usr/lib/modules(/.*)?\tsystem_u:object_r:modules_object_t:s0\n");
    let modules = [update.clone(), policy("test", &modules)].concat();
    for (name, update, written) in [
        ("same-policy", update, 2),
        ("other-policy", relabels, 5),
        ("fewer-labels", unlabels, 4),
        ("module-labels", modules, 4),
    ] {
        let spec = bench.push(&of(&[labelled_system(), update]), &format!("plain:{name}"));
        let (store, whole) = (bench.store(name, Some(&booted)), bench.store(&format!("{name}-whole"), None));
        let delta = try_pull(&spec, &store, Some(&booted)).await.unwrap();
        assert!(!delta.complete);
        assert!(delta.objects_written >= written, "{delta:?}");
        if name == "same-policy" {
            assert_eq!(store.content_objects().unwrap().len(), 2, "{delta:?}");
        }
        let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
        assert_eq!(delta.commit, expected.commit, "{name}");
        let rest = try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
        assert!(rest.complete && rest.commit == expected.commit, "{rest:?}");
        fsck(store.repo_path());
        let listed = listing(store.repo_path(), "coreos/node-image");
        assert_eq!(listed, listing(whole.repo_path(), "coreos/node-image"));
        assert_eq!(listed.contains("modules_object_t"), name == "module-labels", "{listed}");
    }
    // The same image as booted: nothing is written.
    let store = bench.store("same", Some(&booted));
    let again = try_pull(&old_spec(&bench), &store, Some(&booted)).await.unwrap();
    assert_eq!((again.objects_written, Some(again.commit)), (0, booted.commit));
}

fn old_spec(bench: &Bench) -> String {
    format!("{}/plain:old", bench.registry.address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_pull_of_a_plain_image_continues_by_layer() {
    let bench = Bench::new();
    let stack = [labelled_system(), vec![file("usr/share/two", "2")], vec![file("usr/share/three", "3")]];
    let spec = bench.push(&of(&stack), "plain:resumed");
    let layout = format!("oci:{}", bench.path("layout").display());
    let manifest: Value = serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap();
    let last = bench.registry.blob(manifest["layers"][2]["digest"].as_str().unwrap());
    let good = fs::read(&last).unwrap();
    fs::write(&last, b"gone").unwrap();
    let store = bench.store("resumed", None);
    failure(&spec, &store).await;
    fs::write(&last, &good).unwrap();
    let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
    assert_eq!((pulled.layers_fetched, pulled.bytes_fetched), (1, good.len() as u64), "{pulled:?}");
    fsck(store.repo_path());
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_images_that_cannot_boot_are_refused() {
    let bench = Bench::new();
    let without = |path: &str| {
        let mut items = labelled_system();
        items.retain(|item| item.path != path);
        items
    };
    let with_config = |state: &str| {
        let mut items = without("etc/selinux/config");
        items.push(file("etc/selinux/config", &format!("{state}SELINUXTYPE=test\n")));
        items
    };
    let booted_store = bench.store("booted", None);
    let pulled = bench.push(&of(&[labelled_system()]), "plain:booted");
    let pulled = try_pull_with(&pulled, &booted_store, None, complete()).await.unwrap();
    let booted = BootedRepo { path: booted_store.repo_path().to_owned(), commit: Some(pulled.commit) };
    // Not refused if the booted system has no policy: no file got a label of it.
    let unlabelled = bench.push(&of(&[with_config("SELINUX=disabled\n")]), "plain:unlabelled");
    try_pull(&unlabelled, &bench.store("unlabelled", None), None).await.unwrap();
    for (name, layers, booted, words) in [
        ("app", vec![vec![file("usr/bin/app", "app")]], None, "no /usr/lib/os-release"),
        ("no-systemd", vec![without("usr/lib/systemd/systemd")], None, "no /usr/lib/systemd/systemd"),
        (
            "removed",
            vec![labelled_system(), vec![file("usr/lib/.wh.systemd", "")]],
            None,
            "no /usr/lib/systemd/systemd",
        ),
        ("no-policy", vec![system()], Some(&booted), "no SELinux policy"),
        ("disabled-policy", vec![with_config("SELINUX=disabled\n")], Some(&booted), "no SELinux policy"),
        ("config-without-state", vec![system(), with_config("")], Some(&booted), "no SELinux policy"),
        (
            "hidden-policy",
            vec![labelled_system(), vec![file("etc/.wh.selinux", "")]],
            Some(&booted),
            "no SELinux policy",
        ),
    ] {
        let spec = bench.push(&of(&layers), &format!("refused:{name}"));
        let store = bench.store(name, booted);
        let refused = try_pull(&spec, &store, booted).await.unwrap_err();
        assert_eq!(refused.kind, Kind::BadFormat, "{name}: {refused}");
        assert!(refused.message.contains(words) && refused.message.contains("/refused@sha256:"), "{name}: {refused}");
        assert_eq!(store.resolve_ref().unwrap(), None, "{name}");
    }
}

/// Changes the manifest and the config of an OCI layout.
fn rewrite(layout: &Path, change: impl FnOnce(&mut Value, &mut Value)) {
    let read = |digest: &Value| -> Value {
        let digest = digest.as_str().unwrap().replace(':', "/");
        serde_json::from_slice(&fs::read(layout.join("blobs").join(digest)).unwrap()).unwrap()
    };
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let mut manifest = read(&index["manifests"][0]["digest"]);
    let mut config = read(&manifest["config"]["digest"]);
    change(&mut manifest, &mut config);
    manifest["config"] = blob(layout, config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
    let manifest = blob(layout, manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
    write_index(layout, &manifest);
}

#[tokio::test(flavor = "multi_thread")]
async fn configs_that_do_not_fit_the_layers_are_refused() {
    let bench = Bench::new();
    let image = of(&[labelled_system(), vec![file("usr/share/two", "2")]]);
    type Change = fn(&mut Value, &mut Value);
    for (name, change, words) in [
        ("none", (|_, config| config["rootfs"]["diff_ids"] = json!([])) as Change, "2 layers but 0 diff ids"),
        ("missing", |_, config| drop(config.as_object_mut().unwrap().remove("rootfs")), "rootfs"),
        (
            "more",
            |_, config| config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(json!("sha256:12")),
            "3 diff ids",
        ),
        ("order", |manifest, _| manifest["layers"].as_array_mut().unwrap().reverse(), "has the diff id"),
        (
            "empty",
            |manifest, config| {
                (manifest["layers"], config["rootfs"]["diff_ids"]) = (json!([]), json!([]));
            },
            "has no layers",
        ),
    ] {
        let layout = bench.path("layout");
        image.write(&layout);
        rewrite(&layout, change);
        let spec = bench.registry.push(&layout, &format!("config:{name}"));
        let refused = failure(&spec, &bench.store(name, None)).await;
        assert_eq!(refused.kind, Kind::BadFormat, "{name}: {refused}");
        assert!(refused.message.contains(words) && refused.message.contains("/config@sha256:"), "{name}: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_a_plain_layer_may_be_a_hardlink_to_a_kernel_module() {
    let bench = Bench::new();
    let stack = [labelled_system(), vec![link("usr/share/kernel", "usr/lib/modules/6.1/vmlinuz")]];
    let spec = bench.push(&of(&stack), "plain:module");
    let (store, whole) = (bench.store("module", None), bench.store("module-whole", None));
    let delta = try_pull(&spec, &store, None).await.unwrap();
    let repo = format!("--repo={}", store.repo_path().display());
    assert_eq!(run("ostree", &["cat", &repo, "coreos/node-image", "/usr/share/kernel"]), "kernel");
    let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    assert_eq!(delta.commit, expected.commit);
}

/// Content of a plain image is in the store under the name of its label at once, if the booted policy is the image's.
#[tokio::test(flavor = "multi_thread")]
async fn plain_layers_are_labelled_by_the_booted_policy_first() {
    let bench = Bench::new();
    let booted_store = bench.store("booted", None);
    let pulled = bench.push(&of(&[labelled_system()]), "plain:booted");
    let pulled = try_pull_with(&pulled, &booted_store, None, complete()).await.unwrap();
    let booted = BootedRepo { path: booted_store.repo_path().to_owned(), commit: Some(pulled.commit) };
    let update =
        vec![item("usr/bin/kubelet", What::File(noise(600_000, 4), 0o755)), link("usr/bin/k", "usr/bin/kubelet")];
    let spec = bench.push(&of(&[labelled_system(), update]), "plain:update");
    let store = bench.store("update", Some(&booted));
    let pulled = try_pull(&spec, &store, Some(&booted)).await.unwrap();
    // One file with two names that have different labels.
    assert_eq!(pulled.objects_written, 2, "{pulled:?}");
    let repo = format!("--repo={}", store.repo_path().display());
    let id = |path: &str| {
        let shown = run("ostree", &["ls", "-C", &repo, "coreos/node-image", path]);
        shown.split_whitespace().nth(4).unwrap().parse().unwrap()
    };
    let store = NodeStore::open(store.root()).unwrap();
    assert!(store.has(&id("/usr/bin/kubelet"), ObjectType::File) && store.has(&id("/usr/bin/k"), ObjectType::File));
}

/// A pull that ends with a lack of space discards its objects, but not the lists of its layers.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_the_policy_is_read_again_if_objects_are_gone() {
    let bench = Bench::new();
    let tool = item("usr/bin/tool", What::File(b"tool".to_vec(), 0o755));
    let mut rules = layer(&[policy("test", CONTEXTS), vec![tool]].concat());
    rules.components = Some("rpm/selinux-policy-targeted");
    let spec = bench.push(&plain(vec![layer(&system()), rules]), "plain:gone");
    let whole = bench.store("whole", None);
    let expected = try_pull_with(&spec, &whole, None, complete()).await.unwrap();
    for (name, gone) in [("all", None), ("tool", Some(b"tool".to_vec()))] {
        let store = bench.store(name, None);
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        for id in store.content_objects().unwrap() {
            let content = fs::read(store.object_path(&id, ObjectType::File)).ok();
            if gone.is_none() || content == gone {
                store.remove_content(&id, &store.writer().unwrap()).unwrap();
            }
        }
        store.remove_ref().unwrap();
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert_eq!((pulled.commit, pulled.complete), (expected.commit, true), "{name}");
        fsck(store.repo_path());
        let count = |store: &NodeStore| store.content_objects().unwrap().len();
        assert_eq!(count(&store), count(&whole), "{name}: no other copies");
    }
}
