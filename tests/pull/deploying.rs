//! Deployments of a pulled image to the sysroot of a disk. libostree and ostree-ext check the result.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use disk_deploy::{Request, deploy};
use node_store::image::{PullSpec, ResolvedImage};
use node_store::import::PullOptions;
use node_store::store::{BootedRepo, NodeStore};
use ostree::gio;

use super::derived::{Labels, changed_base, complete, layers, with};
use super::disk::Disk;
use super::failing::Small;
use super::fixture::{Image, Repo, run, run_in_namespace};
use super::image_refs::{Counted, bootable, import, init_sysroot, plain_image, run_oracle, sysroot};
use super::layers::oracle;
use super::own_sysroot::in_private;
use super::waits::{files_below, wait_for_files};
use super::{Bench, fsck, try_pull_with};

/// An image in a node store, and the sysroot that it is deployed to.
pub(super) struct Setup {
    pub(super) store: NodeStore,
    pub(super) image: ResolvedImage,
    pub(super) disk: PathBuf,
}

impl Setup {
    /// Starts a deployment in another process, which keeps the deployed directories removable.
    fn spawn(&self, args: &str, imgref: &str) -> Child {
        let pinned = self.image.pinned.to_string();
        let words = [self.store.root().to_str().unwrap(), self.disk.to_str().unwrap(), &pinned, args, imgref];
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "deploying::child_deploy", "--nocapture"])
            .env("PIVOT_CHILD", words.join("|"))
            .env("OSTREE_SYSROOT_DEBUG", "mutable-deployments")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Returns the result or the error of a deployment as it is printed.
    pub(super) fn deploy(&self, args: &str, imgref: &str) -> String {
        let output = self.spawn(args, imgref).wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let result = text.lines().find_map(|line| line.split_once("RESULT ")).unwrap_or_else(|| panic!("{text}")).1;
        let percent: Vec<u8> = text.lines().filter_map(|line| line.split_once("PERCENT ")?.1.parse().ok()).collect();
        assert!(percent.is_sorted(), "{percent:?}");
        if result.ends_with("existed: false }") {
            assert_eq!((percent.first(), percent.last().map(|last| last % 100)), (Some(&0), Some(0)), "{percent:?}");
        }
        println!("{result}");
        result.to_owned()
    }

    pub(super) fn repo(&self) -> PathBuf {
        self.disk.join("ostree/repo")
    }

    /// Returns the directories of the deployments.
    pub(super) fn deployments(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.disk.join("ostree/deploy/node/deploy")).into_iter().flatten();
        let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        found.sort();
        found
    }

    /// Returns the boot loader entries, the one that boots next first.
    pub(super) fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.disk.join("boot/loader/entries")).into_iter().flatten();
        let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found.iter().rev().map(|path| fs::read_to_string(path).unwrap()).collect()
    }

    /// Checks that the disk boots either nothing or all of the image.
    pub(super) fn is_sound(&self) {
        fsck(&self.repo());
        for entry in self.entries() {
            let target = entry.lines().find_map(|line| line.strip_prefix("options ")).unwrap();
            let link = target.split_whitespace().find_map(|arg| arg.strip_prefix("ostree=")).unwrap();
            let root = self.disk.join(link.trim_start_matches('/'));
            for path in ["usr/bin/kubelet", "etc", "usr/lib/os-release"] {
                assert!(root.join(path).exists(), "{entry}: {path}");
            }
            let kernel = entry.lines().find_map(|line| line.strip_prefix("linux /")).unwrap();
            assert!(self.disk.join("boot").join(kernel.trim_start_matches("boot/")).exists(), "{entry}");
        }
    }
}

#[test]
#[ignore = "the child of other tests"]
fn child_deploy() {
    let Ok(words) = std::env::var("PIVOT_CHILD") else { return };
    let [root, disk, pinned, args, imgref] = words.split('|').collect::<Vec<_>>().try_into().unwrap();
    let store = NodeStore::open(Path::new(root)).unwrap();
    let digest = pinned.split_once('@').unwrap().1.parse().unwrap();
    let spec: PullSpec = pinned.parse().unwrap();
    let image = ResolvedImage { requested: spec.clone(), pinned: spec, digest };
    let request = Request {
        sysroot: disk.into(),
        stateroot: "node".into(),
        kernel_args: args.split_whitespace().map(str::to_owned).collect(),
        imgref: (!imgref.is_empty()).then(|| imgref.parse().unwrap()),
        ..Request::default()
    };
    let write = || {
        let progress = |percent| println!("PERCENT {percent}");
        deploy(&store, &image, &request, &progress, &gio::Cancellable::new())
    };
    let deployed = if std::env::var_os("PIVOT_PRIVATE").is_some() { in_private(write) } else { write() };
    match deployed {
        Ok(deployed) => println!("RESULT {deployed:?}"),
        Err(error) => println!("RESULT error {error:?} {error}"),
    }
}

pub(super) fn encapsulated(bench: &Bench, labels: Labels, version: &str) -> Image {
    changed_base(bench, labels, &format!("-bootable{version}"), &|path| {
        fs::write(path.join("usr/lib/os-release"), "ID=node\n").unwrap();
        fs::write(path.join("usr/etc/app/app.conf"), format!("version = {version}\n")).unwrap();
    })
}

/// Pulls an image completely into a store without a booted repo.
pub(super) async fn pulled(bench: &Bench, spec: &str, disk: PathBuf, name: &str) -> Setup {
    let store = bench.store(name, None);
    let image = try_pull_with(spec, &store, None, complete()).await.unwrap().image;
    Setup { store, image, disk }
}

/// The content comes from the node store and the booted repo. The deployment fetches nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_deployed_without_a_second_download() {
    let counted = Counted::new();
    let bench = &counted.bench;
    let oracle = oracle();
    let base = encapsulated(bench, Labels::Own, "1");
    let booted_repo = Repo::create(&bench.path("booted"));
    let (booted_path, source) = (booted_repo.path.to_str().unwrap(), bench.repo.path.to_str().unwrap());
    run("ostree", &["pull-local", "--repo", booted_path, source, &base.commit]);
    let booted = BootedRepo { path: booted_repo.path.clone(), commit: base.commit.parse().ok() };
    for (name, image) in
        [("encapsulated", base.clone()), ("derived", with(base, &layers())), ("plain", bootable(plain_image()))]
    {
        let spec = counted.push(&image, &format!("{name}:1"));
        let store = bench.store(&format!("store-{name}"), Some(&booted));
        counted.served();
        let partial = try_pull_with(&spec, &store, Some(&booted), PullOptions::default()).await.unwrap();
        let (disk, _mount) = sysroot(bench, &format!("disk-{name}"), "64m");
        let setup = Setup { store, image: partial.image, disk };
        if !partial.complete {
            assert!(setup.deploy("", "").starts_with("error Incomplete"), "{name}");
        }
        try_pull_with(&spec, &setup.store, Some(&booted), complete()).await.unwrap();
        let mut served = counted.served();
        served.sort();
        let all = served.len();
        served.dedup();
        // Plain layers with kernel modules are read again for these.
        assert!(name != "encapsulated" || served.len() == all, "{name}: {served:?}");

        let var = setup.disk.join("ostree/deploy/node/var/kept");
        fs::write(&var, "kept").unwrap();
        let result = setup.deploy("root=UUID=1 quiet", "");
        assert!(result.starts_with("Deployed") && result.ends_with("existed: false }"), "{name}: {result}");
        assert_eq!(counted.served(), [""; 0], "{name}");
        setup.is_sound();
        assert_eq!(fs::read_to_string(&var).unwrap(), "kept");
        let deployments = setup.deployments();
        assert_eq!(deployments.len(), 1, "{name}");
        let origin = fs::read_to_string(deployments[0].with_extension("0.origin")).unwrap();
        let imgref = format!("container-image-reference=ostree-unverified-registry:{}", setup.image.pinned);
        assert!(origin.contains(&imgref), "{name}: {origin}");
        assert!(setup.entries()[0].contains("root=UUID=1 quiet"), "{name}: {:?}", setup.entries());
        for (path, label) in
            [("usr/bin", "bin_t"), ("usr/etc/selinux/config", "etc_t"), ("etc/selinux/config", "default_t")]
        {
            let path = deployments[0].join(path);
            let found = support::xattr::get(&path, support::xattr::LABEL).unwrap().unwrap();
            assert!(
                found.escape_ascii().to_string().contains(label),
                "{name}: {}: {}",
                path.display(),
                found.escape_ascii()
            );
        }
        // A repeated call changes nothing.
        let before = files_below(&setup.disk);
        assert!(setup.deploy("root=UUID=1 quiet", "").ends_with("existed: true }"), "{name}");
        assert_eq!((files_below(&setup.disk), setup.deployments()), (before, deployments), "{name}");
        // ostree-ext finds the image on the disk, and its garbage collection keeps it.
        import(&oracle, &setup.repo(), &setup.image.pinned.to_string());
        assert_eq!(counted.served(), [""; 0], "{name}");
        let pruned = run_oracle(&oracle, &["prune", "--sysroot", setup.disk.to_str().unwrap()]);
        assert!(pruned.starts_with("0 0 "), "{name}: {pruned}");
        setup.is_sound();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_keeps_the_previous_system_its_etc_and_its_kernel_arguments() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let first = pulled(&bench, &spec, disk, "first").await;
    first.deploy("root=UUID=1", "");
    let etc = first.deployments()[0].join("etc");
    fs::write(etc.join("local.conf"), "local").unwrap();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "2"), "os:2");
    let second = pulled(&bench, &spec, first.disk.clone(), "second").await;
    let follow = "ostree-image-signed:docker://q.io/example/node:latest";
    let result = second.deploy("quiet root=UUID=1", follow);
    assert!(result.starts_with("Deployed"), "{result}");
    second.is_sound();
    let entries = second.entries();
    assert_eq!((entries.len(), second.deployments().len()), (2, 2), "the previous one stays for a rollback");
    assert_eq!(entries[0].matches("root=UUID=1").count(), 1, "{entries:?}");
    assert!(entries[0].contains(" quiet") && !entries[1].contains(" quiet"), "{entries:?}");
    let next = second.deployments().into_iter().find(|path| !etc.starts_with(path)).unwrap();
    assert_eq!(fs::read_to_string(next.join("etc/local.conf")).unwrap(), "local");
    assert_eq!(fs::read_to_string(next.join("etc/app/app.conf")).unwrap(), "version = 2\n");
    let origin = fs::read_to_string(next.with_extension("0.origin")).unwrap();
    assert!(origin.contains(&format!("container-image-reference={follow}")), "{origin}");
    // The name that updates follow is that of an image in the repo, so that nothing of it is removed.
    let pruned = run_oracle(&oracle(), &["prune", "--sysroot", second.disk.to_str().unwrap()]);
    assert!(pruned.starts_with("1 0 "), "{pruned}: the second image by digest");
    second.is_sound();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_that_boots_next_succeeds_even_if_the_cleanup_fails() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let setup = pulled(&bench, &spec, disk, "store").await;
    assert!(setup.deploy("", "").starts_with("Deployed"));
    let left_over = format!("disk/ostree/deploy/node/deploy/{}.0", "ab".repeat(32));
    let busy = Small::mount(&bench, &format!("{left_over}/busy"), "1m");
    let result = setup.deploy("quiet", "");
    assert!(result.ends_with("existed: false }"), "{result}");
    assert!(setup.entries()[0].contains("quiet") && bench.path(&left_over).exists(), "the cleanup failed");
    drop(busy);
    assert!(setup.deploy("more", "").ends_with("existed: false }"));
    assert!(!bench.path(&left_over).exists(), "the next deployment repeats the cleanup");
    setup.is_sound();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_deployment_is_completed_by_the_next_one() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let setup = pulled(&bench, &spec, disk, "store").await;
    for more in [0, 1, 4, 16, 32, 48, 64, 96, 128] {
        let before = files_below(&setup.disk);
        let mut child = setup.spawn("", "");
        wait_for_files(&mut child, &setup.disk, before, more);
        child.kill().unwrap();
        child.wait().unwrap();
        println!("killed after {more} files: {} deployments", setup.entries().len());
        setup.is_sound();
    }
    assert!(setup.deploy("", "").starts_with("Deployed"));
    setup.is_sound();
    assert_eq!((setup.entries().len(), setup.deployments().len()), (1, 1), "nothing is left of the others");
}

/// The objects that a killed call has written use the free space already.
#[tokio::test(flavor = "multi_thread")]
async fn objects_of_a_killed_deployment_are_not_counted_again() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    let (disk, mount) = sysroot(&bench, "disk", "64m");
    let setup = pulled(&bench, &spec, disk, "store").await;
    run("ostree", &["config", "--repo", setup.repo().to_str().unwrap(), "set", "core.min-free-space-percent", "0"]);
    let leave_free = |bytes: u64| {
        let used: u64 = run("du", &["-sk", &mount.0]).split_whitespace().next().unwrap().parse().unwrap();
        run("mount", &["-o", &format!("remount,size={}k", used + bytes / 1024), &mount.0]);
    };
    leave_free(65536);
    let refused = setup.deploy("", "");
    let (parts, _) = refused.split_once("free: ").unwrap();
    let numbers = parts.split(')').filter_map(|part| part.rsplit_once(", ")?.1.parse::<u64>().ok());
    let (needed, objects) = (numbers.clone().sum::<u64>(), numbers.clone().next().unwrap());
    run("mount", &["-o", "remount,size=64m", &mount.0]);

    // libostree keeps the objects of a transaction that is not committed, for the next one of this boot.
    let [from, to] = [setup.store.repo_path().to_owned(), setup.repo()].map(|path| {
        let repo = ostree::Repo::new_for_path(path);
        repo.open(gio::Cancellable::NONE).unwrap();
        repo
    });
    let commit = from.resolve_rev("coreos/node-image", false).unwrap().unwrap();
    let transaction = to.auto_transaction(gio::Cancellable::NONE).unwrap();
    for object in from.traverse_commit(&commit, 0, gio::Cancellable::NONE).unwrap() {
        let (kind, name) = (object.object_type(), object.checksum());
        to.import_object_from_with_trust(&from, kind, name, true, gio::Cancellable::NONE).unwrap();
    }
    drop(transaction);
    leave_free(needed - objects / 2);
    assert!(setup.deploy("", "").starts_with("Deployed"));
    setup.is_sound();
}

/// A node store on a tmpfs has other names for `user.*` attributes before Linux 6.6.
#[tokio::test(flavor = "multi_thread")]
async fn attributes_that_the_store_substitutes_have_their_names_on_the_disk() {
    const NAMES: [&str; 2] = ["user.app", "trusted.node-image-pivot.user.app"];
    let bench = Bench::new();
    let image = changed_base(&bench, Labels::None, "-attributes", &|path| {
        fs::write(path.join("usr/lib/os-release"), "ID=node\n").unwrap();
        for (name, value) in [(NAMES[0], "app"), ("trusted.other", "other")] {
            support::xattr::set(&path.join("usr/bin/kubelet"), name.as_bytes(), value.as_bytes()).unwrap();
        }
    });
    let spec = bench.push(&image, "os:1");
    let (disk, _mount) = sysroot(&bench, "disk", "64m");
    let setup = pulled(&bench, &spec, disk, "store").await;
    let object = run("find", &[setup.store.repo_path().to_str().unwrap(), "-name", "*.file", "-size", "+1k"]);
    let object =
        object.lines().find(|path| support::xattr::get(Path::new(path), NAMES[0].as_bytes()).unwrap().is_some());
    let object = Path::new(object.unwrap());
    support::xattr::set(object, NAMES[1].as_bytes(), b"app").unwrap();
    support::xattr::remove(object, NAMES[0].as_bytes()).unwrap();
    assert!(setup.deploy("", "").starts_with("Deployed"));
    setup.is_sound();
    let found = NAMES
        .map(|name| support::xattr::get(&setup.deployments()[0].join("usr/bin/kubelet"), name.as_bytes()).unwrap());
    assert_eq!(found, [Some(b"app".to_vec()), None]);
}

#[test]
fn a_power_cut_during_a_deployment_leaves_a_sound_disk() {
    run_in_namespace("deploying::power_cuts");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a_power_cut_during_a_deployment_leaves_a_sound_disk calls it"]
async fn power_cuts() {
    let bench = Bench::new();
    let spec = bench.push(&encapsulated(&bench, Labels::None, "1"), "os:1");
    for fstype in ["ext4", "xfs"] {
        let disk = Disk::new(&bench, fstype, 320);
        let path = bench.path(&format!("{fstype}-sysroot"));
        init_sysroot(&path);
        let setup = pulled(&bench, &spec, path, &format!("store-{fstype}")).await;
        rustix::fs::sync();
        for more in [1, 16, 64] {
            let before = files_below(&setup.disk);
            let mut child = setup.spawn("", "");
            wait_for_files(&mut child, &setup.disk, before, more);
            disk.power_cut();
            child.wait().unwrap();
            disk.power_on();
            println!("{fstype}: cut after {more} files: {} deployments", setup.entries().len());
            setup.is_sound();
        }
        assert!(setup.deploy("", "").starts_with("Deployed"));
        disk.power_cut();
        disk.power_on();
        assert_eq!(setup.entries().len(), 1, "a finished deployment is on the disk");
        setup.is_sound();
    }
}
