//! Tests delta trees with real ostree repos and the real overlayfs.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use node_store::store::{NodeStore, ObjectId};
use ostree::gio::Cancellable;
use ostree::prelude::Cast;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::XattrFlags;

use super::*;
use crate::delta::{Booted, Delta, compare, complete};
use crate::testing::here;
use crate::{Base, mounted_on, open_new_usr};
use support::BlockSize;
use support::testing::private;

fn write(dir: &Path, meta: u8, entries: &Entries) {
    fs::create_dir_all(dir).unwrap();
    for (name, node) in entries {
        let path = dir.join(name);
        match node {
            Node::Dir(meta, below) => write(&path, *meta, below),
            Node::File(content @ 2) => std::os::unix::fs::symlink(format!("to/{content}"), &path).unwrap(),
            Node::File(content) => {
                fs::write(&path, format!("content {content}").repeat(usize::from(*content))).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode([0o644, 0o4755][usize::from(*content % 2)]))
                    .unwrap();
            }
        }
    }
    std::os::unix::fs::chown(dir, Some(u32::from(meta)), Some(7)).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode([0o755, 0o2750, 0o1777][usize::from(meta % 3)])).unwrap();
    rustix::fs::setxattr(dir, "trusted.nip", &[meta], XattrFlags::empty()).unwrap();
}

/// Describes the content and metadata of `dir` (as the empty path) and all paths below it.
fn describe(dir: &Path) -> BTreeMap<PathBuf, String> {
    fn walk(top: &Path, path: &Path, all: &mut BTreeMap<PathBuf, String>) {
        let stat = fs::symlink_metadata(path).unwrap();
        let mut words = format!("{:o} {}:{}", stat.mode(), stat.uid(), stat.gid());
        if stat.is_dir() {
            let mut value = [0; 8];
            let length = rustix::fs::getxattr(path, "trusted.nip", &mut value).unwrap_or(0);
            words += &format!(" xattr {:?}", &value[..length]);
            for entry in fs::read_dir(path).unwrap() {
                walk(top, &entry.unwrap().path(), all);
            }
        } else if stat.is_symlink() {
            words += &format!(" -> {:?}", fs::read_link(path).unwrap());
        } else {
            words += &format!(" {:?}", String::from_utf8_lossy(&fs::read(path).unwrap()));
        }
        all.insert(path.strip_prefix(top).unwrap().to_owned(), words);
    }
    let mut all = BTreeMap::new();
    walk(dir, dir, &mut all);
    all
}

fn repo(path: &Path, parent: Option<&Path>) -> ostree::Repo {
    let repo = ostree::Repo::new_for_path(path);
    fs::create_dir_all(path).unwrap();
    repo.create(ostree::RepoMode::Bare, Cancellable::NONE).unwrap();
    let config = repo.copy_config();
    config.set_string("core", "fsync", "false");
    if let Some(parent) = parent {
        config.set_string("core", "parent", parent.to_str().unwrap());
    }
    repo.write_config(&config).unwrap();
    let repo = ostree::Repo::new_for_path(path);
    repo.open(Cancellable::NONE).unwrap();
    repo
}

fn commit(repo: &ostree::Repo, tree: &Path) -> ObjectId {
    let none = Cancellable::NONE;
    repo.prepare_transaction(none).unwrap();
    let mtree = ostree::MutableTree::new();
    repo.write_dfd_to_mtree(ostree::AT_FDCWD, tree.to_str().unwrap(), &mtree, None, none).unwrap();
    let root = repo.write_mtree(&mtree, none).unwrap().downcast::<ostree::RepoFile>().unwrap();
    let commit = repo.write_commit(None, Some("test"), None, None, &root, none).unwrap();
    repo.commit_transaction(none).unwrap();
    commit.parse().unwrap()
}

struct Machine {
    scratch: PathBuf,
    booted_usr: PathBuf,
    booted_commit: ObjectId,
    store: NodeStore,
    commit: ObjectId,
}

/// Makes a booted system and a pulled target. The store lacks content that the booted repo has.
fn machine(scratch: &Path, old: &Entries, new: &Entries) -> Machine {
    write(&scratch.join("booted/usr"), 1, old);
    write(&scratch.join("target/usr"), 2, new);
    pulled(scratch)
}

/// Makes a machine from the directories `booted` and `target`.
fn pulled(scratch: &Path) -> Machine {
    let booted_usr = scratch.join("booted/usr");
    let booted_repo = repo(&scratch.join("booted-repo"), None);
    let booted_commit = commit(&booted_repo, &scratch.join("booted"));
    let objects = scratch.join("store/repo");
    let target = commit(&repo(&objects, Some(&scratch.join("booted-repo"))), &scratch.join("target"));
    for bucket in fs::read_dir(objects.join("objects")).unwrap() {
        for object in fs::read_dir(bucket.unwrap().path()).unwrap() {
            let object = object.unwrap().path();
            let booted = scratch.join("booted-repo").join(object.strip_prefix(&objects).unwrap());
            if object.extension().is_some_and(|kind| kind.as_bytes() == b"file") && booted.symlink_metadata().is_ok() {
                fs::remove_file(object).unwrap();
            }
        }
    }
    let store = NodeStore::open(&scratch.join("store")).unwrap();
    Machine { scratch: scratch.to_owned(), booted_usr, booted_commit, store, commit: target }
}

impl Machine {
    fn build(&self, booted: Booted<'_>, keep: &Keep) -> Delta {
        let difference = compare(&self.store, booted, self.commit, keep).unwrap();
        difference.build(&self.scratch.join("delta")).unwrap()
    }

    fn build_complete(&self, keep: &Keep) -> Delta {
        let difference = complete(&self.store, &self.booted_usr, self.commit, keep).unwrap();
        let built = difference.build(&self.scratch.join("nip:usr")).unwrap();
        assert!(built.counts.copied_bytes <= difference.bytes_to_copy(BlockSize::page()).unwrap());
        built
    }

    fn show(&self) -> BTreeMap<PathBuf, String> {
        self.show_by(Base::Directory(self.booted_usr.clone()))
    }

    fn show_by(&self, base: Base) -> BTreeMap<PathBuf, String> {
        let target = self.scratch.join("usr");
        fs::create_dir_all(&target).unwrap();
        let mounts = here().mounts().unwrap();
        let tree = open_new_usr(&self.scratch.join("delta"), &base, "nip:usr").unwrap();
        assert_eq!(here().mounts().unwrap(), mounts);
        tree.expose_in(&here(), &target).unwrap();
        let shown = describe(&target);
        assert!(mounted_on(&here().mounts().unwrap(), &target, "nip:usr").is_empty());
        assert!(here().withdraw(&target, "nip:usr").unwrap());
        assert_eq!(here().mounts().unwrap(), mounts);
        shown
    }
}

fn random(random_numbers: &mut StdRng, depth: u32) -> Entries {
    let mut entries = Entries::new();
    for name in NAMES {
        let node = match random_numbers.random_range(0..if depth == 0 { 4 } else { 8 }) {
            0 => continue,
            1..=3 => Node::File(random_numbers.random_range(0..3)),
            _ => Node::Dir(random_numbers.random_range(0..3), random(random_numbers, depth - 1)),
        };
        entries.insert(name.to_owned(), node);
    }
    entries
}

fn mix(random_numbers: &mut StdRng, old: &Entries, new: &Entries) -> Entries {
    let mut mixed = new.clone();
    for (name, node) in old {
        match (node, new.get(name)) {
            (Node::Dir(_, below), Some(Node::Dir(meta, other))) => {
                drop(mixed.insert(name.clone(), Node::Dir(*meta, mix(random_numbers, below, other))));
            }
            _ if random_numbers.random_bool(0.5) => drop(mixed.insert(name.clone(), node.clone())),
            _ => {}
        }
    }
    mixed
}

fn with_root(root_meta: u8, entries: &Entries) -> BTreeMap<PathBuf, String> {
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    write(&place.path().join("usr"), root_meta, entries);
    describe(&place.path().join("usr"))
}

#[test]
fn random_trees_show_as_specified() {
    let mut random_numbers = StdRng::seed_from_u64(7);
    let mut compared = 0;
    for round in 0..40 {
        let old = random(&mut random_numbers, 3);
        let new = random(&mut random_numbers, 3);
        let new = mix(&mut random_numbers, &old, &new);
        let keep = if round % 2 == 0 { keep() } else { Keep::new([], []) };
        let Some(expected) = expected(&old, &new, &keep, Path::new("")) else { continue };
        compared += 1;
        private(|scratch| {
            let machine = machine(scratch, &old, &new);
            let delta = machine.build(Booted::Commit(machine.booted_commit), &keep);
            let shown = machine.show();
            assert_eq!(shown, with_root(2, &expected), "round {round}");

            let before = describe(&machine.booted_usr);
            let differs = |path: &Path| before.get(path) != shown.get(path);
            for path in before.keys().chain(shown.keys()) {
                let below = |other: &&PathBuf| other.starts_with(path) && differs(other);
                let expected = before.keys().chain(shown.keys()).any(|other| below(&other));
                assert_eq!(delta.lookup().unwrap().contains(path).unwrap(), expected, "round {round}: {path:?}");
            }
            // A second build replaces the delta and the remains of a killed build.
            fs::create_dir_all(scratch.join(".delta.building/junk")).unwrap();
            assert_eq!(machine.build(Booted::Commit(machine.booted_commit), &keep), delta);
            assert_eq!(machine.show(), shown);
            // Without a booted commit, the visible tree is the same.
            machine.build(Booted::Directory(&machine.booted_usr), &keep);
            assert_eq!(machine.show(), shown, "round {round}, commit unknown");
            // A complete tree shows the same without an overlay. The modules are a mount in it.
            if round % 8 == 0 {
                machine.build_complete(&keep);
                assert_eq!(machine.show_by(Base::Bound(machine.booted_usr.clone())), shown, "round {round}, bound");
            }
        });
    }
    assert!(compared > 10, "only {compared} rounds were comparable");
}

#[test]
fn a_complete_tree_copies_only_booted_and_kept_files() {
    private(|scratch| {
        let usr = |file, content| Entries::from([("a".into(), Node::File(1)), (file, Node::File(content))]);
        let machine = machine(scratch, &usr("keep-1".into(), 3), &usr("new".into(), 5));
        let counts = machine.build_complete(&keep()).counts;
        assert_eq!((counts.added + counts.changed, counts.removed, counts.copied, counts.directories), (2, 0, 2, 1));
        let links = |name: &str| fs::metadata(scratch.join("nip:usr").join(name)).unwrap().nlink();
        assert_eq!((links("new"), links("a"), links("keep-1")), (2, 1, 1));
    });
}

#[test]
fn a_moved_file_is_copied_and_a_new_one_linked() {
    private(|scratch| {
        let old = Entries::from([("a".into(), Node::Dir(0, [("was".into(), Node::File(1))].into()))]);
        let new = Entries::from([
            ("b".into(), Node::Dir(0, [("is".into(), Node::File(1)), ("again".into(), Node::File(1))].into())),
            ("new".into(), Node::File(3)),
        ]);
        let machine = machine(scratch, &old, &new);
        let delta = machine.build(Booted::Commit(machine.booted_commit), &Keep::default());
        let counts = delta.counts;
        assert_eq!((counts.added, counts.changed, counts.removed, counts.copied), (3, 0, 1, 1), "{counts:?}");
        let inode = |path: &str| fs::metadata(scratch.join("delta").join(path)).unwrap().ino();
        assert_eq!(inode("b/is"), inode("b/again"), "copied once");
        assert!(fs::metadata(scratch.join("delta/new")).unwrap().nlink() > 1);
        assert_eq!(machine.show(), with_root(2, &new));
    });
}

/// Uses an image with embedded container storage, whose marks must not affect the agent's overlay.
#[test]
fn marks_for_other_overlays_are_omitted() {
    private(|scratch| {
        let file = |content| Node::File(content);
        let dir = |entries: &[(&str, u8)]| {
            Node::Dir(0, entries.iter().map(|(name, content)| ((*name).into(), file(*content))).collect())
        };
        let old = Entries::from([("x".into(), dir(&[("kept", 1)])), ("s".into(), dir(&[("was", 3)]))]);
        let new = Entries::from([
            ("x".into(), dir(&[("kept", 1), ("new", 3)])),
            ("s".into(), dir(&[("was", 3), ("m", 5), (".ostree-wh.was", 1)])),
        ]);
        write(&scratch.join("booted/usr"), 2, &old);
        write(&scratch.join("target/usr"), 2, &new);
        let mark = |path: &str, name: &str, value: &[u8]| {
            rustix::fs::setxattr(scratch.join("target/usr").join(path), name, value, XattrFlags::empty()).unwrap();
        };
        mark("x", "trusted.overlay.opaque", b"y");
        mark("s/m", "trusted.overlay.metacopy", b"");
        mark("s/m", "trusted.overlay.redirect", b"/nowhere");
        let machine = pulled(scratch);
        let delta = machine.build(Booted::Commit(machine.booted_commit), &Keep::new([], []));
        let mut shown = new;
        if let Some(Node::Dir(_, below)) = shown.get_mut("s") {
            below.remove(".ostree-wh.was");
        }
        assert_eq!(machine.show(), with_root(2, &shown));
        let warnings = delta.warnings.join("\n");
        for words in ["2 files and directories", "example /usr/s/m", "1 whiteouts", "/usr/s/.ostree-wh.was"] {
            assert!(warnings.contains(words), "{words}: {warnings}");
        }
    });
}

#[test]
fn copies_of_booted_files_need_whole_pages() {
    private(|scratch| {
        let file = |name: &str| Entries::from([(name.into(), Node::File(3))]);
        let machine = machine(scratch, &file("old"), &file("new"));
        let booted = Booted::Commit(machine.booted_commit);
        let difference = compare(&machine.store, booted, machine.commit, &Keep::new([], [])).unwrap();
        for page in [4 << 10, 64 << 10] {
            assert_eq!(difference.bytes_to_copy(BlockSize::new(page)).unwrap(), page);
        }
    });
}

#[test]
fn a_missing_object_is_named_and_nothing_is_left() {
    private(|scratch| {
        let machine = machine(scratch, &Entries::new(), &Entries::from([("new".into(), Node::File(3))]));
        for bucket in fs::read_dir(scratch.join("store/repo/objects")).unwrap() {
            for object in fs::read_dir(bucket.unwrap().path()).unwrap() {
                let object = object.unwrap().path();
                if object.extension().is_some_and(|kind| kind == "file") {
                    fs::remove_file(object).unwrap();
                }
            }
        }
        let booted = Booted::Commit(machine.booted_commit);
        let out = scratch.join("delta");
        let difference = compare(&machine.store, booted, machine.commit, &Keep::new([], [])).unwrap();
        let error = difference.build(&out).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("/usr/new") && error.contains("cannot find the content object"), "{error}");
        assert!(!out.exists());
    });
}
