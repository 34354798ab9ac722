//! Tests on real file systems: `apply` produces the result of the plan, and `undo` restores the old state.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use super::properties::families;
use super::*;
use crate::apply::Merge;
use crate::journal::UndoJournal;
use support::testing::private;

/// Creates the tree on disk.
fn write(path: &Path, entry: &Entry, content: &dyn Fn(&str) -> String) {
    match &entry.leaf.content {
        Content::File { sha256, .. } => fs::write(path, content(sha256)).unwrap(),
        Content::Symlink(target) => std::os::unix::fs::symlink(target.as_path(), path).unwrap(),
        Content::Directory => fs::create_dir_all(path).unwrap(),
        Content::Other => rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
    }
    for (name, child) in &entry.children {
        write(&path.join(Bytes(name.clone()).as_path()), child, content);
    }
    let Meta { mode, uid, gid, xattrs } = &entry.leaf.meta;
    std::os::unix::fs::lchown(path, Some(*uid), Some(*gid)).unwrap();
    if !matches!(entry.leaf.content, Content::Symlink(_)) {
        fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
    }
    for (name, value) in xattrs {
        rustix::fs::lsetxattr(path, &name.0, &value.0, XattrFlags::empty()).unwrap();
    }
    if matches!(entry.leaf.content, Content::File { .. }) {
        let label = format!("label of {}", entry.leaf.meta.uid);
        rustix::fs::lsetxattr(path, "security.selinux", label.as_bytes(), XattrFlags::empty()).unwrap();
    }
}

pub(super) fn write_tree(path: &Path, etc: &Snapshot) {
    let known: BTreeMap<String, String> =
        (0..8).map(|number| (hex::encode(Sha256::digest(text(number))), text(number))).collect();
    write(path, &etc.root, &|sha256| known[sha256].clone());
}

pub(super) fn rescan(path: &Path) -> Snapshot {
    scan(open_dir(path).unwrap().as_fd()).unwrap()
}

/// Returns the labels and times of all files, which undo must restore and a snapshot does not contain.
pub(super) fn beyond(path: &Path) -> BTreeMap<std::path::PathBuf, (Vec<u8>, i64)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        let stat = fs::symlink_metadata(&path).unwrap();
        if stat.is_dir() {
            all.extend(beyond(&path));
        } else if stat.is_file() {
            let mut label = [0; 64];
            let length = rustix::fs::lgetxattr(&path, "security.selinux", &mut label).unwrap_or(0);
            all.insert(path, (label[..length].to_vec(), stat.mtime_nsec()));
        }
    }
    all
}

/// Creates a directory with B, N and C.
pub(super) fn stage(scratch: &Path, name: &str, trees: &[Snapshot; 3]) -> std::path::PathBuf {
    let place = scratch.join(name);
    fs::create_dir_all(&place).unwrap();
    for (name, tree) in ["base", "new", "etc"].into_iter().zip(trees) {
        write_tree(&place.join(name), tree);
    }
    place
}

pub(super) fn plan_in(place: &Path) -> Plan {
    let [base, new, etc] = ["base", "new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    plan(base.as_fd(), new.as_fd(), etc.as_fd(), &Defaults::default()).unwrap()
}

fn apply_in(place: &Path, plan: &Plan) -> Report {
    let [new, etc] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    apply(plan, new.as_fd(), etc.as_fd(), &place.join("state/undo")).unwrap()
}

pub(super) fn undo_in(place: &Path) -> UndoReport {
    undo(&place.join("state/undo"), open_dir(&place.join("etc")).unwrap().as_fd()).unwrap()
}

#[test]
fn random_trees_are_applied_and_undone() {
    private(|scratch| {
        let round = std::cell::Cell::new(0);
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(150) });
        runner
            .run(&families(), |trees| {
                round.set(round.get() + 1);
                let place = stage(scratch, &format!("{}", round.get()), &trees);
                let etc = place.join("etc");
                prop_assert_eq!(&rescan(&etc), &trees[2]);
                let before = beyond(&etc);

                let plan = plan_in(&place);
                prop_assert_eq!(&plan, &decide(&trees[0], &trees[1], &trees[2]));
                let report = apply_in(&place, &plan);
                prop_assert_eq!((report.applied, report.skipped.len()), (plan.changes.len(), 0));
                let after = rescan(&etc);
                prop_assert_eq!(&after, &outcome(&plan, &trees[2]));
                for path in plan.aside.keys() {
                    let aside = place.join("state/etc-new").join(path.as_path());
                    prop_assert!(aside.symlink_metadata().is_ok(), "{:?}", aside);
                }
                let inodes = beyond(&etc);
                prop_assert_eq!(apply_in(&place, &plan).applied, plan.changes.len());
                prop_assert_eq!(beyond(&etc), inodes, "the repeated call wrote an entry");

                let undone = undo_in(&place);
                prop_assert_eq!((undone.kept.len(), undone.failed.len()), (0, 0));
                prop_assert_eq!(&rescan(&etc), &trees[2]);
                prop_assert_eq!(beyond(&etc), before);
                prop_assert_eq!(undo_in(&place), UndoReport::default());

                // Stop halfway, then complete or undo the merge.
                let record_dir = place.join("state/undo");
                let [new, etc_dir] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
                for finish in [false, true] {
                    let mut record = UndoJournal::create(&record_dir, &plan).unwrap();
                    let merge = Merge { new_dir: new.as_fd(), etc_dir: etc_dir.as_fd() };
                    let mut report = Report::new(&plan, &place);
                    merge.carry_out(&mut record, plan.changes.len() / 2, &mut report).unwrap();
                    drop(record);
                    if finish {
                        apply_in(&place, &plan);
                        prop_assert_eq!(&rescan(&etc), &after);
                    }
                    undo_in(&place);
                    prop_assert_eq!(&rescan(&etc), &trees[2]);
                }
                fs::remove_dir_all(&place).unwrap();
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn etc_can_be_an_overlay() {
    private(|scratch| {
        let base = etc([("d", dir(0, [("a", file(1, 0))])), ("f", file(1, 0)), ("gone", dir(0, [("x", file(1, 0))]))]);
        let new = etc([("d", file(3, 1)), ("f", dir(1, [("y", file(2, 0))])), ("n", file(2, 2)), ("l", link(1))]);
        let place = stage(scratch, "live", &[base.clone(), new.clone(), base.clone()]);
        for name in ["upper", "work"] {
            fs::create_dir(place.join(name)).unwrap();
        }
        write_tree(&place.join("upper"), &etc([]));
        let options = format!("lowerdir={0}/base,upperdir={0}/upper,workdir={0}/work", place.display());
        let options = std::ffi::CString::new(options).unwrap();
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", place.join("etc"), "overlay", none, options.as_c_str()).unwrap();

        let plan = plan_in(&place);
        let report = apply_in(&place, &plan);
        assert_eq!(report.skipped, []);
        assert_eq!(rescan(&place.join("etc")), new);
        assert_eq!(undo_in(&place).failed, []);
        assert_eq!(rescan(&place.join("etc")), base);
    });
}

#[test]
fn changes_by_other_processes_are_kept_and_reported() {
    private(|scratch| {
        let base = etc([("a", file(1, 0)), ("b", file(1, 0)), ("d", dir(0, [("x", file(1, 0))]))]);
        let new = etc([("a", file(2, 0)), ("b", file(2, 0)), ("n", file(2, 0))]);
        let place = stage(scratch, "race", &[base.clone(), new, base]);
        let plan = plan_in(&place);
        // Before the merge, another process changes a file, and creates an entry in a directory that the plan removes.
        fs::write(place.join("etc/a"), "mine").unwrap();
        fs::write(place.join("etc/d/mine"), "mine").unwrap();
        let report = apply_in(&place, &plan);
        let skipped: Vec<String> = report.skipped.iter().map(|skipped| skipped.path.to_string()).collect();
        assert_eq!(skipped, ["d", "a"]);
        assert_eq!(fs::read(place.join("etc/a")).unwrap(), b"mine");
        assert!(report.to_string().contains("not changed: /etc/a"), "{report}");
        // Before the undo, it changes another file.
        fs::write(place.join("etc/n"), "mine now").unwrap();
        let undone = undo_in(&place);
        assert_eq!(undone.kept.len(), 1);
        assert_eq!(undone.kept[0].path, Bytes::from("n"));
        assert_eq!(fs::read_to_string(place.join("etc/b")).unwrap(), text(1));
        assert!(place.join("etc/d/x").exists());
        assert!(!place.join("state/undo").exists());
    });
}

#[test]
fn links_and_mounts_are_not_followed() {
    private(|scratch| {
        let base = etc([("d", dir(0, [("x", file(1, 0))])), ("m", dir(0, [("x", file(1, 0))])), ("f", file(1, 0))]);
        let new = etc([("d", dir(0, [("x", file(2, 0))])), ("m", dir(0, [("x", file(2, 0))])), ("f", file(2, 0))]);
        let place = stage(scratch, "links", &[base.clone(), new, base]);
        let plan = plan_in(&place);
        assert_eq!(plan.changes.len(), 3);
        // Another process replaces a directory by a link, and mounts over a directory and a file.
        let outside = scratch.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("x"), text(1)).unwrap();
        fs::remove_dir_all(place.join("etc/d")).unwrap();
        std::os::unix::fs::symlink(&outside, place.join("etc/d")).unwrap();
        rustix::mount::mount_bind(&outside, place.join("etc/m")).unwrap();
        rustix::mount::mount_bind(outside.join("x"), place.join("etc/f")).unwrap();
        let report = apply_in(&place, &plan);
        assert_eq!((report.applied, report.skipped.len()), (0, 3), "{report}");
        assert_eq!(fs::read_to_string(outside.join("x")).unwrap(), text(1));

        let again = plan_in(&place);
        assert!(again.changes.is_empty());
        let of = |path: &str| again.decisions.iter().find(|decision| decision.path == Bytes::from(path)).unwrap();
        assert_eq!([of("m").class, of("f").class], [Class::Local; 2]);
        assert_eq!(of("d").class, Class::Local, "the node image did not change the directory's own metadata");
        assert_eq!(of("d/x").class, Class::Conflict);
    });
}

#[test]
fn another_plan_is_refused_and_a_full_disk_leaves_the_entry() {
    private(|scratch| {
        let place =
            stage(scratch, "two", &[etc([("a", file(1, 0))]), etc([("a", file(2, 0))]), etc([("a", file(1, 0))])]);
        let plan = plan_in(&place);
        let state = place.join("state");
        fs::create_dir(&state).unwrap();
        rustix::mount::mount("small", &state, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=64k")).unwrap();
        fs::write(state.join("filler"), [0; 65536]).unwrap();
        let [new, dir] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
        let error = apply(&plan, new.as_fd(), dir.as_fd(), &state.join("undo")).unwrap_err();
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");
        assert_eq!(fs::read_to_string(place.join("etc/a")).unwrap(), text(1));
        fs::remove_file(state.join("filler")).unwrap();
        assert_eq!(apply_in(&place, &plan).applied, 1);
        let other = Plan::default();
        let error = apply(&other, new.as_fd(), dir.as_fd(), &state.join("undo")).unwrap_err();
        assert!(error.to_string().contains("another merge"), "{error}");
    });
}

#[test]
fn a_change_that_was_killed_halfway_is_completed_or_undone() {
    // The changes with more than one step: file to directory, directory to file, and metadata of a directory.
    let base = etc([("f", file(1, 0)), ("d", dir(0, [])), ("m", dir(0, [])), ("c", file(1, 0))]);
    let new = etc([("f", dir(1, [])), ("d", file(2, 1)), ("m", dir(2, [])), ("c", file(2, 0))]);
    private(|scratch| {
        for (round, (finish, deeper)) in
            [(true, false), (true, true), (false, false), (false, true)].into_iter().enumerate()
        {
            let place = stage(scratch, &format!("{round}"), &[base.clone(), new.clone(), base.clone()]);
            let plan = plan_in(&place);
            let [from, dir] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
            let etc_path = place.join("etc");
            // Make all changes, so that the journal is complete. Then restore the states in the middle of a change by
            // hand.
            let mut record = UndoJournal::create(&place.join("state/undo"), &plan).unwrap();
            let merge = Merge { new_dir: from.as_fd(), etc_dir: dir.as_fd() };
            merge.carry_out(&mut record, plan.changes.len(), &mut Report::new(&plan, &place)).unwrap();
            drop(record);
            let journal = place.join("state/undo/journal");
            fs::write(&journal, [fs::read(&journal).unwrap(), b"{\"change\":7,\"la".to_vec()].concat()).unwrap();
            fs::remove_dir(etc_path.join("f")).unwrap();
            fs::remove_file(etc_path.join("d")).unwrap();
            let waiting = etc_path.join(".node-image-pivot-new");
            fs::create_dir(&waiting).unwrap();
            fs::write(waiting.join("0"), "half of it").unwrap();
            fs::set_permissions(etc_path.join("m"), fs::Permissions::from_mode(base_mode())).unwrap();
            if deeper {
                write(&etc_path.join("f"), &file(1, 0), &|_| text(1));
                fs::create_dir(waiting.join("1")).unwrap();
            }
            if finish {
                assert_eq!(apply_in(&place, &plan).skipped, []);
                assert_eq!(rescan(&etc_path), new);
            }
            let undone = undo_in(&place);
            assert_eq!((undone.kept, undone.failed), (vec![], vec![]));
            assert_eq!(rescan(&etc_path), base);
            let left = fs::read_dir(&etc_path).unwrap().count();
            assert_eq!(left, 4, "a temporary file is left");
        }
    });
}

fn base_mode() -> u32 {
    meta(0).mode
}

/// Returns an access control list in the kernel's format: version 2, then tag, permissions and id of each entry.
fn acl(user: u32) -> Bytes {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, id) in [(1u16, u32::MAX), (2, user), (4, u32::MAX), (0x10, u32::MAX), (0x20, u32::MAX)] {
        value.extend(tag.to_le_bytes());
        value.extend(4u16.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Bytes(value)
}

#[test]
fn access_control_lists_are_merged() {
    private(|scratch| {
        let listed = |content, name: &str, user| {
            let mut entry = if content == 0 { dir(0, []) } else { file(content, 0) };
            entry.leaf.meta.mode = 0o444;
            entry.leaf.meta.xattrs.insert(Bytes::from(name), acl(user));
            entry
        };
        let access = |content, user| listed(content, "system.posix_acl_access", user);
        // New entries of this directory inherit a list.
        let inherited = |children: &[(&'static str, u8)]| {
            let mut entry = listed(0, "system.posix_acl_default", 7);
            let children = children.iter().map(|(name, content)| (name.as_bytes().to_vec(), file(*content, 0)));
            entry.children.extend(children);
            entry
        };
        let base = etc([("f", access(1, 1)), ("local", file(1, 0)), ("d", inherited(&[("a", 1)]))]);
        let new = etc([("f", access(2, 2)), ("local", file(2, 0)), ("d", inherited(&[("a", 2), ("b", 1)]))]);
        let current = etc([("f", access(1, 1)), ("local", access(1, 3)), ("d", inherited(&[("a", 1)]))]);
        let place = stage(scratch, "acl", &[base, new, current.clone()]);
        assert_eq!(rescan(&place.join("etc")), current);
        let plan = plan_in(&place);
        assert_eq!(apply_in(&place, &plan).skipped, []);
        // A local list and the node image's content are both taken.
        let merged = etc([("f", access(2, 2)), ("local", access(2, 3)), ("d", inherited(&[("a", 2), ("b", 1)]))]);
        assert_eq!(rescan(&place.join("etc")), merged);
        undo_in(&place);
        assert_eq!(rescan(&place.join("etc")), current);
    });
}

#[test]
fn the_order_of_entries_on_disk_is_ignored() {
    private(|scratch| {
        for (dir, numbers) in [("up", [1, 2, 3, 4, 5]), ("down", [5, 4, 3, 2, 1])] {
            fs::create_dir(scratch.join(dir)).unwrap();
            for number in numbers {
                fs::write(scratch.join(dir).join(format!("\u{e4}{number}")), text(number)).unwrap();
            }
        }
        assert_eq!(rescan(&scratch.join("up")), rescan(&scratch.join("down")));
    });
}

#[test]
fn entries_get_the_label_of_the_plan() {
    private(|scratch| {
        let trees = [etc([("a", file(1, 0))]), etc([("a", file(2, 0)), ("b", file(1, 0))]), etc([("a", file(1, 0))])];
        let place = stage(scratch, "label", &trees);
        let mut plan = plan_in(&place);
        for change in &mut plan.changes {
            change.label = Some(Bytes(format!("by policy: {}", change.path).into_bytes()));
        }
        assert_eq!(apply_in(&place, &plan).unlabelled, 0);
        let labels: Vec<_> = beyond(&place.join("etc")).into_values().map(|(label, _)| label).collect();
        assert_eq!(labels, [b"by policy: a".to_vec(), b"by policy: b".to_vec()]);
        undo_in(&place);
        assert_eq!(beyond(&place.join("etc")).into_values().next().unwrap().0, b"label of 0");
    });
}

#[test]
fn relabel_sets_refused_labels_on_entries_that_still_equal_the_plan() {
    private(|scratch| {
        let trees = [etc([]), etc([("a", file(1, 0)), ("b", file(2, 0)), ("c", file(1, 0))]), etc([])];
        let place = stage(scratch, "relabel", &trees);
        let mut plan = plan_in(&place);
        assert_eq!(apply_in(&place, &plan).applied, 3);
        let root = place.join("etc");
        fs::write(root.join("b"), "changed").unwrap();
        for change in &mut plan.changes {
            change.label = (change.path.0 != b"c").then(|| Bytes(format!("by policy: {}", change.path).into_bytes()));
        }
        let etc = open_dir(&root).unwrap();
        assert_eq!(relabel(&plan, etc.as_fd()).unwrap(), 1);
        let labels: Vec<_> = beyond(&root).into_values().map(|(label, _)| label).collect();
        assert_eq!(labels[0], b"by policy: a");
        assert!(!labels[1].starts_with(b"by policy") && labels[2] == b"label of 0", "{labels:?}");
        assert_eq!(relabel(&plan, etc.as_fd()).unwrap(), 0, "a second call changed labels");
        undo_in(&place);
        assert!(!root.join("a").exists() && root.join("b").exists());
    });
}

#[test]
fn missing_space_is_reported_in_numbers() {
    private(|scratch| {
        let place =
            stage(scratch, "room", &[etc([("a", file(1, 0))]), etc([("a", file(2, 0))]), etc([("a", file(1, 0))])]);
        let plan = plan_in(&place);
        let small = place.join("small");
        fs::create_dir(&small).unwrap();
        let mount = |options| {
            rustix::mount::mount("small", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(options)).unwrap();
        };
        mount(c"size=4k");
        assert_eq!(
            check_room(&plan, &small, &place).unwrap(),
            [format!(
                "the switch needs up to 8.0 KiB on the file system of {}, which has 4.0 KiB free; free space there",
                small.display()
            )]
        );
        mount(c"size=1m,nr_inodes=5");
        let missing = check_room(&plan, &place, &small).unwrap();
        assert!(missing.len() == 1 && missing[0].contains("creates up to 9 files"), "{missing:?}");
        // A file system without a limit is not checked.
        mount(c"size=0,nr_inodes=0");
        assert_eq!(check_room(&plan, &small, &small).unwrap(), Vec::<String>::new());
        for _ in 0..3 {
            rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    });
}
