//! The switch without the agent around it: two commits in real ostree repos, a delta on a tmpfs, a real
//! overlay over a scratch `usr`, the merge of a scratch `etc`, and all of it undone. The oracle for
//! `/usr` is `ostree checkout`.
//!
//! Needs root and the `ostree` program; everything happens in a private mount namespace.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use etc_merge::Class;
use nix::sched::CloneFlags;
use node_store::store::{NodeStore, ObjectId};
use overlay_root::delta::{Booted, Delta, Keep};
use overlay_root::{Base, Namespace};
use rustix::mount::{MountFlags, MountPropagationFlags};

#[path = "switch/bound.rs"]
mod bound;
#[path = "switch/composefs.rs"]
mod composefs;

const SOURCE: &str = "node-image:test";

fn private(test: impl FnOnce(&Path) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let scratch = tempfile::tempdir().unwrap();
            rustix::mount::mount("scratch", scratch.path(), "tmpfs", MountFlags::empty(), Some(c"nr_inodes=0"))
                .unwrap();
            test(scratch.path());
            rustix::mount::unmount(scratch.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn here() -> Namespace {
    Namespace::of(rustix::thread::gettid().as_raw_nonzero().get())
}

fn ostree(arguments: &[&str]) -> String {
    let output = Command::new("ostree").args(arguments).output().unwrap();
    assert!(output.status.success(), "ostree {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn repo(path: &Path, parent: Option<&Path>) {
    let option = format!("--repo={}", path.display());
    ostree(&["init", &option, "--mode=bare"]);
    ostree(&["config", &option, "set", "core.fsync", "false"]);
    if let Some(parent) = parent {
        ostree(&["config", &option, "set", "core.parent", parent.to_str().unwrap()]);
    }
}

fn commit(repo: &Path, tree: &Path) -> String {
    let tree = format!("--tree=dir={}", tree.display());
    ostree(&["commit", &format!("--repo={}", repo.display()), "--branch=test", &tree])
}

fn id(commit: &str) -> ObjectId {
    commit.parse().unwrap()
}

fn write(root: &Path, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("-> ") {
            Some(target) => symlink(target, &path).unwrap(),
            None => fs::write(&path, content).unwrap(),
        }
    }
}

/// Every path below `dir` with kind, mode, owner and content.
fn describe(dir: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(top: &Path, dir: &Path, all: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let words = match () {
                () if stat.is_dir() => String::new(),
                () if stat.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                () => fs::read_to_string(&path).unwrap(),
            };
            let words = format!("{:o} {}:{} {words}", stat.mode(), stat.uid(), stat.gid());
            all.insert(path.strip_prefix(top).unwrap().to_owned(), words);
            if stat.is_dir() {
                walk(top, &path, all);
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(dir, dir, &mut all);
    all
}

fn build(root: &Path, booted: &str, target: &str) -> Delta {
    let (store, booted) = (NodeStore::open(root).unwrap(), Booted::Commit(id(booted)));
    let difference = overlay_root::delta::compare(&store, booted, id(target), &Keep::default()).unwrap();
    difference.build(&root.join("delta")).unwrap()
}

const BOOTED: &[(&str, &str)] = &[
    ("bin/bash", "bash 5"),
    ("bin/node-image-pivot", "the agent"),
    ("bin/sudo", "sudo"),
    ("bin/sh", "-> bash"),
    ("lib/gone.so", "gone"),
    ("lib/gone.d/a/b", "gone"),
    ("lib/turns-dir", "a file"),
    ("lib/turns-file/inside", "x"),
    ("lib/turns-link/inside", "x"),
    ("lib/modules/6.1/vmlinuz", "booted kernel"),
    ("lib/os-release", "ID=old\n"),
    ("lib/systemd/system/node-image-pull.service", "ours"),
    ("lib/systemd/systemd", "systemd 252"),
    ("share/same/a", "a"),
    ("share/moved/from", "moved content"),
    ("etc/default", "default 1"),
    ("etc/edited", "default 1"),
    ("etc/both", "default 1"),
    ("etc/deleted", "default 1"),
    ("etc/dropped", "default 1"),
    ("etc/passwd", "root"),
];

const TARGET: &[(&str, &str)] = &[
    ("bin/bash", "bash 6"),
    ("bin/kubelet", "kubelet"),
    ("bin/sudo", "sudo"),
    ("bin/sh", "-> dash"),
    ("bin/true", "true"),
    ("lib/turns-dir/inside", "x"),
    ("lib/turns-file", "a file"),
    ("lib/turns-link", "-> modules"),
    ("lib/modules/6.12/vmlinuz", "new kernel"),
    ("lib/os-release", "ID=new\n"),
    ("lib/systemd/system/kubelet.service", "kubelet"),
    ("lib/systemd/systemd", "systemd 257"),
    ("share/same/a", "a"),
    ("share/moved/to", "moved content"),
    ("etc/default", "default 2"),
    ("etc/edited", "default 1"),
    ("etc/both", "default 2"),
    ("etc/deleted", "default 1"),
    ("etc/added", "default 2"),
    ("etc/passwd", "root\nkubelet"),
];

/// A booted system and the tree of a node image, in ostree repos below a scratch directory.
struct Machine<'a> {
    scratch: &'a Path,
    delta: Delta,
    target: String,
    usr: PathBuf,
    base: Base,
    etc: PathBuf,
    /// `/usr` before the switch.
    booted_usr: BTreeMap<PathBuf, String>,
    /// `/etc` before the switch, with an administrator's changes.
    local_etc: BTreeMap<PathBuf, String>,
}

impl<'a> Machine<'a> {
    /// Returns a system whose `/usr` is a directory of its deployment.
    fn new(scratch: &'a Path) -> Self {
        Self::booted(scratch, |repo, commit| {
            let usr = scratch.join("usr");
            checkout(repo, commit, &usr);
            (usr.clone(), Base::Directory(usr))
        })
    }

    /// Returns a system that `boot` boots from a repo and a commit: its `/usr`, and the layers of the new one.
    fn booted(scratch: &'a Path, boot: impl FnOnce(&Path, &str) -> (PathBuf, Base)) -> Self {
        let path = |name: &str| scratch.join(name);
        write(&path("booted/usr"), BOOTED);
        write(&path("target/usr"), TARGET);
        for tree in ["booted", "target"] {
            fs::set_permissions(path(tree).join("usr/bin/sudo"), fs::Permissions::from_mode(0o4755)).unwrap();
        }
        repo(&path("booted-repo"), None);
        let booted = commit(&path("booted-repo"), &path("booted"));
        assert!(overlay_root::tmpfs(&here(), &path("store"), 16 << 20, "node-image:store").unwrap());
        repo(&path("store/repo"), Some(&path("booted-repo")));
        let target = commit(&path("store/repo"), &path("target"));
        let delta = build(&path("store"), &booted, &target);
        let (usr, base) = boot(&path("booted-repo"), &booted);
        let etc = path("etc");
        write(&etc, &[("default", "default 1"), ("edited", "by the administrator"), ("both", "by the administrator")]);
        write(&etc, &[("dropped", "default 1"), ("passwd", "root\ncore"), ("own", "local")]);
        let (booted_usr, local_etc) = (describe(&usr), describe(&etc));
        Self { scratch, delta, target, usr, base, etc, booted_usr, local_etc }
    }

    /// Plans the merge of `/etc`, exposes the new `/usr`, and carries the plan out.
    fn switch(&self) -> etc_merge::Report {
        let tree = overlay_root::open_new_usr(&self.delta.directory, &self.base, SOURCE).unwrap();
        let new = etc_merge::open_defaults(tree.as_fd()).unwrap().unwrap();
        let old = etc_merge::open_dir(&self.usr.join("etc")).unwrap();
        let etc = etc_merge::open_dir(&self.etc).unwrap();
        let plan = etc_merge::plan(old.as_fd(), new.as_fd(), etc.as_fd(), &etc_merge::Defaults::default()).unwrap();
        assert_eq!(describe(&self.usr), self.booted_usr, "nothing is switched yet");
        tree.expose_in(&here(), &self.usr).unwrap();
        etc_merge::apply(&plan, new.as_fd(), etc.as_fd(), &self.scratch.join("state/undo")).unwrap()
    }

    /// Compares the exposed `/usr` with a checkout of the node image.
    fn compare(&self) {
        checkout(&self.scratch.join("store/repo"), &self.target, &self.scratch.join("checkout"));
        let modules = |all: BTreeMap<PathBuf, String>| {
            all.into_iter().partition::<BTreeMap<_, _>, _>(|(path, _)| path.starts_with("lib/modules"))
        };
        let (shown_modules, mut shown) = modules(describe(&self.usr));
        let (booted_modules, booted) = modules(self.booted_usr.clone());
        let (_, expected) = modules(describe(&self.scratch.join("checkout")));
        assert_eq!(shown_modules, booted_modules);
        for kept in ["bin/node-image-pivot", "lib/systemd/system/node-image-pull.service"] {
            assert_eq!(shown.remove(Path::new(kept)).as_ref(), booted.get(Path::new(kept)));
        }
        assert_eq!(shown, expected);
    }

    fn undo(&self) {
        let etc = etc_merge::open_dir(&self.etc).unwrap();
        let undone = etc_merge::undo(&self.scratch.join("state/undo"), etc.as_fd()).unwrap();
        assert!(undone.kept.is_empty() && undone.failed.is_empty(), "{undone:?}");
        assert!(here().withdraw(&self.usr, SOURCE).unwrap());
    }
}

/// Checks out `/usr` of a commit, as ostree deploys it.
fn checkout(repo: &Path, commit: &str, to: &Path) {
    let option = format!("--repo={}", repo.display());
    ostree(&["checkout", &option, "--subpath=/usr", commit, to.to_str().unwrap()]);
}

#[test]
fn only_changed_paths_are_in_the_delta() {
    private(|scratch| {
        let delta = Machine::new(scratch).delta;
        for (name, differs) in
            [("bin/bash", true), ("bin/sudo", false), ("lib/gone.d/a/b", true), ("share/same", false)]
        {
            assert_eq!(delta.lookup().unwrap().contains(Path::new(name)).unwrap(), differs, "{name}");
        }
    });
}

#[test]
fn usr_is_the_node_images_except_for_kernel_modules_and_the_agent() {
    private(|scratch| {
        let machine = Machine::new(scratch);
        machine.switch();
        machine.compare();
    });
}

/// A release may have merged both directories, and the other not yet. `/sbin` is a link to `usr/sbin` in each.
#[test]
fn sbin_may_be_a_link_to_bin_on_one_side_only() {
    const DIRECTORY: &[(&str, &str)] = &[("sbin/iptables", "iptables")];
    const LINK: &[(&str, &str)] = &[("sbin", "-> bin"), ("bin/iptables", "iptables")];
    for (booted, target) in [(DIRECTORY, LINK), (LINK, DIRECTORY)] {
        private(|scratch| {
            write(&scratch.join("booted/usr"), booted);
            write(&scratch.join("target/usr"), target);
            let machine = Machine::new(scratch);
            machine.switch();
            machine.compare();
            assert_eq!(fs::read_to_string(machine.usr.join("sbin/iptables")).unwrap(), "iptables");
            machine.undo();
            assert_eq!(describe(&machine.usr), machine.booted_usr);
        });
    }
}

#[test]
fn etc_is_merged_and_a_conflict_keeps_the_local_file() {
    private(|scratch| {
        let machine = Machine::new(scratch);
        let report = machine.switch();
        let merged: BTreeMap<String, String> = fs::read_dir(&machine.etc)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap()))
            .collect();
        let expected = [
            ("added", "default 2"),
            ("both", "by the administrator"),
            ("default", "default 2"),
            ("edited", "by the administrator"),
            ("own", "local"),
            ("passwd", "root\ncore"),
        ];
        assert_eq!(merged, expected.map(|(name, content)| (name.to_owned(), content.to_owned())).into());
        assert_eq!(report.counts[&Class::Conflict], 1, "{report}");
        assert_eq!(fs::read_to_string(scratch.join("state/etc-new/both")).unwrap(), "default 2");
    });
}

#[test]
fn an_undo_restores_usr_and_etc() {
    private(|scratch| {
        let machine = Machine::new(scratch);
        machine.switch();
        machine.undo();
        assert_eq!(describe(&machine.usr), machine.booted_usr);
        assert_eq!(describe(&machine.etc), machine.local_etc);
        assert!(here().withdraw(&scratch.join("store"), "node-image:store").unwrap());
    });
}

/// A file that is opened again and again across the switch is never missing.
#[test]
fn usr_is_never_missing_during_a_switch() {
    private(|scratch| {
        let path = |name: &str| scratch.join(name);
        for (tree, word) in [("usr", "old"), ("delta", "new")] {
            write(&path(tree), &[("a", word), ("b", word)]);
        }
        let stop = std::sync::atomic::AtomicBool::new(false);
        let ns = here();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = BTreeMap::new();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    *seen.entry(fs::read_to_string(path("usr/a")).unwrap()).or_insert(0) += 1;
                }
                seen
            });
            let base = Base::Directory(path("usr"));
            for _ in 0..200 {
                overlay_root::open_new_usr(&path("delta"), &base, SOURCE)
                    .unwrap()
                    .expose_in(&ns, &path("usr"))
                    .unwrap();
                assert_eq!(fs::read_to_string(path("usr/a")).unwrap(), "new");
                assert!(ns.withdraw(&path("usr"), SOURCE).unwrap());
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let seen = reader.join().unwrap();
            assert_eq!(seen.keys().collect::<Vec<_>>(), ["new", "old"]);
        });
    });
}

/// Prints how long things take: `cargo test --release --test switch -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn how_long_it_takes() {
    private(|scratch| {
        let path = |name: &str| scratch.join(name);
        let file = |root: &str, number: usize, content: &str| {
            let place = path(root).join(format!("lib/d{}/e{}/f{number}", number % 200, number % 3000));
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, format!("{number} {content}")).unwrap();
        };
        for number in 0..50_000 {
            file("booted/usr", number, "old");
            file("target/usr", number, if number % 2 == 0 { "new" } else { "old" });
        }
        repo(&path("booted-repo"), None);
        let booted = commit(&path("booted-repo"), &path("booted"));
        fs::create_dir(path("store")).unwrap();
        repo(&path("store/repo"), Some(&path("booted-repo")));
        let target = commit(&path("store/repo"), &path("target"));
        let start = Instant::now();
        let delta = build(&path("store"), &booted, &target);
        println!("delta, half of 50,000 files changed: {:?} {:?}", start.elapsed(), delta.counts);
        let start = Instant::now();
        let delta = build(&path("store"), &booted, &booted);
        println!("delta, nothing changed: {:?} {:?}", start.elapsed(), delta.counts);
        let empty = path("empty/usr");
        fs::create_dir_all(&empty).unwrap();
        let nothing = commit(&path("booted-repo"), &path("empty"));
        let start = Instant::now();
        let delta = build(&path("store"), &nothing, &target);
        println!("delta, all 50,000 files: {:?} {:?}", start.elapsed(), delta.counts);

        for number in 0..5000 {
            for (tree, content) in [("base", "1"), ("etc", "1"), ("new", "2")] {
                let place = path(tree).join(format!("d{}/f{number}", number % 300));
                fs::create_dir_all(place.parent().unwrap()).unwrap();
                fs::write(place, content.repeat(2000)).unwrap();
            }
        }
        let [base, new, dir] = ["base", "new", "etc"].map(|name| etc_merge::open_dir(&path(name)).unwrap());
        let start = Instant::now();
        let plan = etc_merge::plan(base.as_fd(), new.as_fd(), dir.as_fd(), &etc_merge::Defaults::default()).unwrap();
        println!("etc plan, {} changes: {:?}", plan.changes.len(), start.elapsed());
        let start = Instant::now();
        etc_merge::apply(&plan, new.as_fd(), dir.as_fd(), &path("state/undo")).unwrap();
        println!("etc apply: {:?}", start.elapsed());
        let start = Instant::now();
        let undone = etc_merge::undo(&path("state/undo"), dir.as_fd()).unwrap();
        println!("etc undo of {}: {:?}", undone.restored, start.elapsed());
    });
}
