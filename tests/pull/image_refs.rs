//! The refs and commits with which ostree-ext finds an image that the agent pulled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use node_store::import::PullOptions;
use node_store::store::{BootedRepo, NodeStore, ObjectId, ObjectType};

use super::derived::{Labels, base, complete, layers, with};
use super::failing::Small;
use super::faults::Faults;
use super::fixture::{Image, fsck, listing, run};
use super::layers::{Item, What, dir, file, item, layer, oracle};
use super::page;
use super::plain::{labelled_system, plain};
use super::tree::noise;
use super::{Bench, image, try_pull_with};

/// A registry behind a proxy that counts what it serves.
pub(super) struct Counted {
    pub(super) bench: Bench,
    faults: Faults,
}

impl Counted {
    pub(super) fn new() -> Self {
        let bench = Bench::new();
        let faults = Faults::before(&bench.registry.address);
        Self { bench, faults }
    }

    pub(super) fn push(&self, image: &Image, name: &str) -> String {
        self.bench.push(image, name).replace(&self.bench.registry.address, &self.faults.address)
    }

    /// Returns the manifest of the image that was pushed last.
    fn manifest(&self) -> serde_json::Value {
        let layout = format!("oci:{}", self.bench.path("layout").display());
        serde_json::from_str(&run("skopeo", &["inspect", "--raw", &layout])).unwrap()
    }

    /// Returns the digests of the layers of the image that was pushed last.
    pub(super) fn layers(&self) -> Vec<String> {
        let manifest = self.manifest();
        let digest = |layer: &serde_json::Value| layer["digest"].as_str().unwrap().to_owned();
        manifest["layers"].as_array().unwrap().iter().map(digest).collect()
    }

    /// Returns the digest of the config of that image.
    fn config(&self) -> String {
        self.manifest()["config"]["digest"].as_str().unwrap().to_owned()
    }

    /// Returns the layers of that image that were served since the last call.
    pub(super) fn served(&self) -> Vec<String> {
        let layers = self.layers();
        self.faults.served().into_iter().filter(|digest| layers.contains(digest)).collect()
    }
}

pub(super) fn refs(repo: &Path) -> Vec<String> {
    let listed = run("ostree", &["refs", "--repo", repo.to_str().unwrap(), "--list", "ostree/container"]);
    listed.lines().map(str::to_owned).collect()
}

pub(super) fn resolve(repo: &Path, name: &str) -> String {
    run("ostree", &["rev-parse", "--repo", repo.to_str().unwrap(), name]).trim().to_owned()
}

pub(super) fn run_oracle(oracle: &str, args: &[&str]) -> String {
    let output = Command::new(oracle).args(args).env("OSTREE_SYSROOT_DEBUG", "mutable-deployments").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    println!("{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(super) fn import(oracle: &str, repo: &Path, spec: &str) -> String {
    run_oracle(oracle, &["import", "--repo", repo.to_str().unwrap(), &format!("ostree-unverified-registry:{spec}")])
}

/// A plain image in which a later layer replaces a file of the first one. Some entries of the first one cannot be part of a
/// commit.
pub(super) fn plain_image() -> Image {
    let modules = vec![dir("usr/lib/modules/6.1/"), file("usr/lib/modules/6.1/vmlinuz", "kernel")];
    let later = vec![item("usr/bin/kubelet", What::File(noise(9000, 4), 0o755)), file("usr/bin/.wh.bash", "")];
    let left_out = vec![file("run/lock", ""), item("usr/share/fifo", What::Fifo), item("usr/share/null", What::Device)];
    plain(
        [[labelled_system(), left_out].concat(), modules, later].iter().map(|items: &Vec<Item>| layer(items)).collect(),
    )
}

fn kinds(bench: &Bench) -> [(&'static str, Image); 3] {
    [
        ("encapsulated", image(bench, 1, 1)),
        ("derived", with(base(bench, Labels::Own), &layers())),
        ("plain", plain_image()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn ostree_ext_finds_complete_images_and_fetches_no_layer() {
    let counted = Counted::new();
    let oracle = oracle();
    for (name, image) in kinds(&counted.bench) {
        let spec = counted.push(&image, &format!("{name}:1"));
        let store = counted.bench.store(name, None);
        let pulled = try_pull_with(&spec, &store, None, PullOptions::default()).await.unwrap();
        assert!(!pulled.complete);
        assert_eq!(refs(store.repo_path()), [""; 0], "{name}: an incomplete pull sets no ref");
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        fsck(store.repo_path());
        let found = refs(store.repo_path());
        let images = found.iter().filter(|name| name.starts_with("ostree/container/image/")).count();
        assert_eq!(images, 2, "{name}: by tag and by digest: {found:?}");
        counted.faults.served();
        for spec in [spec, pulled.image.pinned.to_string()] {
            let merged = import(&oracle, store.repo_path(), &spec);
            assert_eq!(counted.served(), [""; 0], "{name}");
            let root = |commit: &str| {
                run("ostree", &["ls", "-C", "-d", "--repo", store.repo_path().to_str().unwrap(), commit])
            };
            assert_eq!(root(&merged), root("coreos/node-image"), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refs_that_another_program_removed_are_set_again() {
    let counted = Counted::new();
    for (name, image) in kinds(&counted.bench) {
        let spec = counted.push(&image, &format!("{name}:1"));
        let store = counted.bench.store(name, None);
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        let found = refs(store.repo_path());
        run("ostree", &["refs", "--repo", store.repo_path().to_str().unwrap(), "--delete", "ostree/container"]);
        counted.served();
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert_eq!((refs(store.repo_path()), counted.served()), (found, Vec::new()), "{name}");
        assert!(pulled.complete, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_have_the_commits_of_ostree_ext() {
    let bench = Bench::new();
    let image = image(&bench, 1, 1);
    let spec = bench.push(&image, "layers:1");
    let store = bench.store("ours", None);
    try_pull_with(&spec, &store, None, PullOptions::default()).await.unwrap();
    try_pull_with(&spec, &store, None, complete()).await.unwrap();
    let theirs = bench.path("theirs");
    run("ostree", &["init", "--mode=bare", "--repo", theirs.to_str().unwrap()]);
    import(&oracle(), &theirs, &spec);
    let blobs: Vec<String> = refs(&theirs).into_iter().filter(|name| name.contains("/blob/")).collect();
    assert_eq!(blobs.len(), 5, "{blobs:?}");
    for name in blobs {
        assert_eq!(resolve(store.repo_path(), &name), resolve(&theirs, &name), "{name}");
    }
}

/// After a pull without the kernel modules into the repo of a disk, ostree-ext fetches only the layers that the pull did not
/// store as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn ostree_ext_uses_the_layers_of_an_incomplete_pull() {
    let counted = Counted::new();
    let oracle = oracle();
    // The first layer, and those with files of the kernel or files that a later layer hides.
    for ((name, image), again) in kinds(&counted.bench).into_iter().zip([2, 4, 1]) {
        let spec = counted.push(&image, &format!("{name}:1"));
        let (disk, _mount) = sysroot(&counted.bench, &format!("disk-{name}"), "64m");
        let repo = disk.join("ostree/repo");
        let store = NodeStore::on_disk(&repo, None).unwrap();
        let booted = BootedRepo { path: repo.clone(), commit: None };
        let pulled = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
        let found = refs(&repo);
        assert!(!pulled.complete && found.iter().all(|name| name.contains("/blob/")), "{name}: {found:?}");
        assert_eq!(found.len(), counted.layers().len() - again, "{name}: {found:?}");
        fsck(&repo);
        store.remove_ref().unwrap();
        assert_eq!(refs(&repo), [""; 0], "{name}: an undo removes them");
        try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
        assert_eq!(refs(&repo), found, "{name}");
        // The refs of layers of another image do not accumulate.
        let second = counted.push(&super::image(&counted.bench, 2, 1), &format!("{name}:2"));
        let second = try_pull_with(&second, &store, Some(&booted), PullOptions::default()).await.unwrap();
        try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
        let now = refs(&repo);
        assert!(now.iter().all(|name| found.contains(name)), "{name}: {now:?}, {found:?}");
        counted.push(&image, &format!("{name}:1"));
        // This version refuses plain images.
        if name != "plain" {
            counted.served();
            import(&oracle, &repo, &spec);
            let served = counted.served();
            assert_eq!(served.len(), again, "{name}: {served:?} of {:?}", counted.layers());
            fsck(&repo);
            store.remove_ref().unwrap();
            assert!(refs(&repo).len() > found.len(), "{name}: the layers of ostree-ext's image keep their refs");
        }
        // ostree-ext may make another merge commit, and does not know the agent's.
        let mut marked = fs::read_dir(repo.join("state")).unwrap().map(|entry| entry.unwrap().file_name());
        let own = [pulled.commit, second.commit].map(|commit| format!("{commit}.commitpartial"));
        assert!(marked.all(|name| own.contains(&name.to_string_lossy().into_owned())), "{name}");
    }
}

/// A pull writes objects again that disappeared, and the ref by digest, which ostree-ext's garbage collection removes.
#[tokio::test(flavor = "multi_thread")]
async fn a_complete_pull_heals_the_store() {
    let counted = Counted::new();
    for (name, image) in kinds(&counted.bench) {
        let store = counted.bench.store(name, None);
        let other = counted.push(&super::image(&counted.bench, 2, 1), &format!("{name}-other:2"));
        try_pull_with(&other, &store, None, complete()).await.unwrap();
        let other = refs(store.repo_path()).into_iter().find(|name| name.ends_with("_3A_2")).unwrap();
        let spec = counted.push(&image, &format!("{name}:1"));
        let pulled = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        let tree = listing(store.repo_path(), "coreos/node-image");
        let own = format!("{name}_40_sha256");
        let by_digest = refs(store.repo_path()).into_iter().find(|name| name.contains(&own)).unwrap();
        run("ostree", &["refs", "--repo", store.repo_path().to_str().unwrap(), "--delete", &by_digest]);
        counted.served();
        let config = counted.bench.registry.blob(&counted.config());
        fs::rename(&config, config.with_extension("gone")).unwrap();
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert!(refs(store.repo_path()).contains(&by_digest), "{name}: without the registry");
        let commit = resolve(store.repo_path(), &by_digest);
        fs::rename(config.with_extension("gone"), &config).unwrap();
        let shell =
            tree.lines().find(|line| line.ends_with(" /usr/bin/kubelet") || line.ends_with(" /usr/bin/newtool"));
        let lost: ObjectId = shell.unwrap().split_whitespace().nth(4).unwrap().parse().unwrap();
        fs::remove_file(store.object_path(&lost, ObjectType::File)).unwrap();
        let again = try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert_eq!((again.commit, again.complete), (pulled.commit, true), "{name}");
        fsck(store.repo_path());
        assert_eq!(listing(store.repo_path(), "coreos/node-image"), tree, "{name}");
        // Another program moved the tag's ref to another image, and removed the ref by digest.
        let by_tag = refs(store.repo_path()).into_iter().find(|name| name.ends_with("_3A_1")).unwrap();
        let heads = store.repo_path().join("refs/heads");
        fs::write(heads.join(&by_tag), format!("{}\n", resolve(store.repo_path(), &other))).unwrap();
        fs::remove_file(heads.join(&by_digest)).unwrap();
        try_pull_with(&spec, &store, None, complete()).await.unwrap();
        assert_eq!(resolve(store.repo_path(), &by_digest), commit, "{name}: the right image");
    }
}

/// Creates an ostree sysroot without a boot loader on a small file system, whose free space no other process changes.
pub(super) fn sysroot(bench: &Bench, name: &str, size: &str) -> (PathBuf, Small) {
    let mount = Small::mount(bench, name, size);
    init_sysroot(&bench.path(name));
    (bench.path(name), mount)
}

/// Creates an ostree sysroot without a boot loader, by the commands of docs/single-node.md.
pub(super) fn init_sysroot(path: &Path) {
    let commands = page::commands().sysroot.replace("/mnt", path.to_str().unwrap()).replace("NAME", "node");
    run("sh", &["-ec", &commands]);
}

/// The system that the images of [`kinds`] lack to be bootable, as a layer.
pub(super) fn bootable(mut image: Image) -> Image {
    image.layers.push(layer(&[
        file("usr/lib/os-release", "ID=node\n"),
        file("usr/lib/modules/6.1/vmlinuz", "kernel"),
        dir("etc/"),
    ]));
    image
}

/// After a pull into the repo of a disk, ostree-ext deploys the image without a download, in the sequence of the assisted
/// installer for an existing root. Its garbage collection and ostree's keep the deployed system.
#[tokio::test(flavor = "multi_thread")]
async fn ostree_ext_deploys_a_pulled_image_without_a_download() {
    let counted = Counted::new();
    let oracle = oracle();
    for (name, image) in kinds(&counted.bench) {
        let spec = counted.push(&bootable(image), &format!("{name}:1"));
        let (disk, _mount) = sysroot(&counted.bench, &format!("disk-{name}"), "64m");
        let (text, repo) = (disk.to_str().unwrap(), disk.join("ostree/repo"));
        let store = NodeStore::on_disk(&repo, None).unwrap();
        let booted = BootedRepo { path: repo.clone(), commit: None };
        counted.faults.served();
        try_pull_with(&spec, &store, Some(&booted), complete()).await.unwrap();
        run("ostree", &["refs", "--repo", repo.to_str().unwrap(), "--delete", "coreos/node-image"]);
        fs::write(repo.join("tmp/node-image"), "").unwrap();
        let command = page::commands().ostree_ext.replace("IMAGE", &spec).replace("NAME", "node");
        let command = command.replace("--sysroot / ", &format!("--sysroot {text} ")).replace("--imgref ", "");
        let words: Vec<&str> = command.strip_prefix("ostree container image ").unwrap().split(' ').collect();
        run_oracle(&oracle, &words);
        let (mut served, mut layers) = (counted.served(), counted.layers());
        served.sort();
        layers.sort();
        assert_eq!(served, layers, "{name}: each layer was fetched once");
        // The image stays by its deployed name, because that is in the origin; its ref by digest is removed.
        let pruned = run_oracle(&oracle, &["prune", "--sysroot", text]);
        assert!(pruned.starts_with("1 0 "), "{name}: {pruned}");
        fsck(&repo);
        // Neither does another image's import remove its layers.
        let other = counted.push(&super::image(&counted.bench, 2, 1), "other:1");
        counted.faults.served();
        import(&oracle, &repo, &other);
        let shared = counted.layers().len() - counted.served().len();
        assert_eq!(shared, usize::from(name == "encapsulated"), "{name}: the layers of both images are not fetched");
        fsck(&repo);
        run_oracle(&oracle, &["prune", "--sysroot", text]);
        run("ostree", &["admin", "undeploy", "--sysroot", text, "0"]);
        let pruned = run_oracle(&oracle, &["prune", "--sysroot", text]);
        assert!(pruned.starts_with("1 "), "{name}: {pruned}");
        assert_eq!(refs(&repo), [""; 0], "{name}: nothing is left");
    }
}
