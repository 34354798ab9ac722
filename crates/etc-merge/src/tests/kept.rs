//! Entries that the merge keeps, and changes by other processes at the same moment.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::durable::run;
use super::real::{plan_in, rescan, stage, undo_in, write_tree};
use super::*;
use crate::place::{Outcome, Place, Source};
use crate::staging::Staging;
use support::BlockSize;
use support::testing::private;

const NONE: rustix::mount::MountFlags = rustix::mount::MountFlags::empty();

fn apply_in(place: &Path, plan: &Plan) -> Report {
    let [new, etc] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    apply(plan, new.as_fd(), etc.as_fd(), &place.join("state/undo")).unwrap()
}

#[test]
fn a_save_between_the_comparison_and_the_rename_is_kept() {
    private(|scratch| {
        write_tree(&scratch.join("etc"), &etc([("f", file(1, 0)), ("gone", file(1, 0))]));
        write_tree(&scratch.join("new"), &etc([("f", file(2, 0)), ("d", dir(0, []))]));
        let [etc, new] = ["etc", "new"].map(|name| open_dir(&scratch.join(name)).unwrap());
        let path = Bytes::from("f");
        let place = Place::find(etc.as_fd(), &path).unwrap().unwrap();
        let current = place.look().unwrap().unwrap();
        for (number, replacement) in [file(2, 0), dir(0, []), link(1)].into_iter().enumerate() {
            let staging = Staging::open(etc.as_fd()).unwrap();
            let content = Place::find(new.as_fd(), &path).unwrap().unwrap().open().unwrap();
            let mut source = Source { content: Some(content), ..Source::default() };
            staging.make(number, &replacement.leaf, &mut source).unwrap();
            // An editor saves: it overwrites the file, or renames another file over it.
            if number == 0 {
                fs::write(scratch.join("etc/f"), "saved in place").unwrap();
            } else {
                fs::write(scratch.join("etc/f.swp"), "saved by a rename").unwrap();
                fs::rename(scratch.join("etc/f.swp"), scratch.join("etc/f")).unwrap();
            }
            let outcome = staging.put(number, &place, Some(&current)).unwrap();
            assert_eq!(outcome, Outcome::Skipped("changed since the plan was made"));
            assert!(fs::read_to_string(scratch.join("etc/f")).unwrap().starts_with("saved"));
            staging.close().unwrap();
        }
        let staging = Staging::open(etc.as_fd()).unwrap();
        assert!(matches!(staging.remove(0, &place, &current).unwrap(), Outcome::Skipped(_)));
        assert!(fs::read_to_string(scratch.join("etc/f")).unwrap().starts_with("saved"));
        staging.close().unwrap();
        assert_eq!(fs::read_dir(scratch.join("etc")).unwrap().count(), 2, "a temporary file is left");
    });
}

#[test]
fn the_mode_of_etc_itself_is_merged_when_it_is_a_mount_point() {
    private(|scratch| {
        let trees = || [0, 2, 0].map(|number| Snapshot { root: dir(number, [("a", file(1, 0))]) });
        let place = stage(scratch, "mode", &trees());
        rustix::mount::mount("etc", place.join("etc"), "tmpfs", NONE, None).unwrap();
        write_tree(&place.join("etc"), &trees()[2]);
        assert_eq!(apply_in(&place, &plan_in(&place)).skipped, []);
        assert_eq!(rescan(&place.join("etc")), trees()[1]);
        undo_in(&place);
        assert_eq!(rescan(&place.join("etc")), trees()[2]);
    });
}

#[test]
fn copies_of_conflicts_count_as_space() {
    private(|scratch| {
        let place = stage(scratch, "aside", &[1, 2, 3].map(|content| etc([("a", file(content, 0))])));
        fs::write(place.join("new/a"), vec![0; 3 << 20]).unwrap();
        let plan = plan_in(&place);
        assert_eq!((plan.count(Class::Conflict), plan.bytes(BlockSize::new(4096))), (1, 3 << 20));
        let small = place.join("small");
        fs::create_dir(&small).unwrap();
        rustix::mount::mount("small", &small, "tmpfs", NONE, Some(c"size=2m")).unwrap();
        let missing = check_room(&plan, &place, &small).unwrap();
        assert!(missing.len() == 1 && missing[0].contains("needs up to 3."), "{missing:?}");
    });
}

#[test]
fn hard_links_of_a_file_are_merged_separately() {
    private(|scratch| {
        let both = |one, two| etc([("a", file(one, 0)), ("b", file(two, 0))]);
        let place = stage(scratch, "links", &[both(1, 1), both(2, 1), both(1, 1)]);
        fs::remove_file(place.join("etc/b")).unwrap();
        fs::hard_link(place.join("etc/a"), place.join("etc/b")).unwrap();
        assert_eq!(apply_in(&place, &plan_in(&place)).skipped, []);
        assert_eq!(rescan(&place.join("etc")), both(2, 1), "the content of the other name changed");
        undo_in(&place);
        assert_eq!(rescan(&place.join("etc")), both(1, 1));
    });
}

/// The second merge gets the list of the first as the next boot reads it.
#[test]
fn a_plan_treats_listed_defaults_as_defaults() {
    private(|scratch| {
        let base = etc([("changed", file(1, 0))]);
        let first = etc([("changed", file(2, 0)), ("added", file(1, 0)), ("edited", file(1, 0))]);
        let second = etc([("changed", file(3, 0)), ("edited", file(2, 0))]);
        let place = stage(scratch, "twice", &[base.clone(), first, base]);
        let plan_one = plan_in(&place);
        apply_in(&place, &plan_one);
        fs::write(place.join("etc/edited"), "edited here").unwrap();
        let list: Defaults = serde_json::from_str(&serde_json::to_string(&plan_one.later()).unwrap()).unwrap();
        write_tree(&place.join("second"), &second);
        let [base, second, etc] = ["base", "second", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
        let plan_with = |list: &Defaults| plan(base.as_fd(), second.as_fd(), etc.as_fd(), list).unwrap();
        assert_eq!(changed(&plan_with(&Defaults::default())), [""; 0], "without a list, all are local changes");
        let plan_two = plan_with(&list);
        assert_eq!(changed(&plan_two), ["added", "changed"]);
        assert_eq!(reason(&plan_two, "edited").0, Class::Conflict);
        assert_eq!(plan_two.earlier, list, "an undo restores this list");
    });
}

fn changed(plan: &Plan) -> Vec<String> {
    plan.changes.iter().map(|change| change.path.to_string()).collect()
}

fn reason<'a>(plan: &'a Plan, path: &str) -> (Class, &'a str) {
    let decision = plan.decisions.iter().find(|decision| decision.path == Bytes::from(path)).unwrap();
    (decision.class, &decision.reason)
}

/// Creates a separate disk with B, N and C, each with a file `a` to change.
fn on_disk(scratch: &Path, fstype: &str, mib: u64) -> PathBuf {
    let (image, place) = (scratch.join(format!("{fstype}.img")), scratch.join(fstype));
    fs::create_dir(&place).unwrap();
    fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
    run(&format!("mkfs.{fstype}"), &["-q", image.to_str().unwrap()]);
    run("mount", &["-o", "loop", image.to_str().unwrap(), place.to_str().unwrap()]);
    let tree = |content| etc([("a", file(content, 0)), ("d", dir(0, [("x", file(content, 0))]))]);
    stage(scratch, fstype, &[tree(1), tree(2), tree(1)])
}

#[test]
fn immutable_and_append_only_entries_are_kept() {
    private(|scratch| {
        for flag in ["i", "a"] {
            let place = on_disk(scratch, if flag == "i" { "xfs" } else { "ext4" }, 300);
            let etc = |name: &str| place.join("etc").join(name).to_str().unwrap().to_owned();
            fs::write(place.join("new/d/added"), "").unwrap();
            run("chattr", &[&format!("+{flag}"), &etc("a"), &etc("d")]);
            let plan = plan_in(&place);
            assert!(plan.changes.is_empty(), "{plan:?}");
            for path in ["a", "d/x", "d/added"] {
                let (class, reason) = reason(&plan, path);
                assert!(class == Class::Local && reason.contains(&format!("chattr +{flag}")), "{path}: {reason}");
            }
            assert_eq!(apply_in(&place, &plan).skipped, []);
            undo_in(&place);
            run("chattr", &[&format!("-{flag}"), &etc("a"), &etc("d")]);
            assert_eq!(changed(&plan_in(&place)), ["a", "d/added", "d/x"]);
            run("umount", &["--lazy", place.to_str().unwrap()]);
        }
    });
}

#[test]
fn a_default_whose_attributes_etc_cannot_hold_is_kept() {
    private(|scratch| {
        let tree = |number| etc([("a", file(1, number)), ("b", file(1, 0))]);
        let place = stage(scratch, "attributes", &[tree(0), tree(2), tree(0)]);
        fs::write(place.join("new/b"), "new").unwrap();
        assert_eq!(changed(&plan_in(&place)), ["a", "b"]);
        // A ramfs has no extended attributes.
        rustix::mount::mount("etc", place.join("etc"), "ramfs", NONE, None).unwrap();
        for name in ["a", "b"] {
            fs::copy(place.join("base").join(name), place.join("etc").join(name)).unwrap();
            std::os::unix::fs::chown(place.join("etc").join(name), Some(0), Some(5)).unwrap();
        }
        std::os::unix::fs::chown(place.join("etc"), Some(0), Some(5)).unwrap();
        let root = std::os::unix::fs::PermissionsExt::from_mode(meta(0).mode);
        fs::set_permissions(place.join("etc"), root).unwrap();
        let plan = plan_in(&place);
        assert_eq!((changed(&plan), reason(&plan, "a").0), (vec!["b".to_owned()], Class::Local));
        assert!(reason(&plan, "a").1.contains("extended attribute"), "{plan:?}");
        assert_eq!(apply_in(&place, &plan).skipped, []);
        assert_eq!(fs::read_dir(place.join("etc")).unwrap().count(), 2, "the test of the attributes left a file");
    });
}

/// The kernel refuses every access to another user's mount, also that of its metadata.
#[test]
fn a_mount_without_a_server_or_of_another_user_is_not_read() {
    private(|scratch| {
        for user in [0, 1234] {
            let tree = |content| etc([("a", file(content, 0)), ("dead", dir(0, []))]);
            let place = stage(scratch, &format!("dead-{user}"), &[tree(1), tree(2), tree(1)]);
            let server = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
            let options = format!("fd={},rootmode=40000,user_id={user},group_id=0", server.as_raw_fd());
            let options = std::ffi::CString::new(options).unwrap();
            rustix::mount::mount("dead", place.join("etc/dead"), "fuse", NONE, options.as_c_str()).unwrap();
            drop(server);
            assert!(fs::read_dir(place.join("etc/dead")).is_err());
            let plan = plan_in(&place);
            assert_eq!((changed(&plan), reason(&plan, "dead").0), (vec!["a".to_owned()], Class::Local), "{user}");
        }
    });
}

#[test]
fn a_file_under_a_lease_is_kept() {
    private(|scratch| {
        let tree = |content| etc([("a", file(content, 0)), ("b", file(content, 0))]);
        let place = stage(scratch, "lease", &[tree(1), tree(2), tree(1)]);
        let script = "import fcntl, os, signal, sys\nsignal.signal(signal.SIGIO, signal.SIG_IGN)\n\
                      fd = os.open(sys.argv[1], os.O_RDWR)\nfcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
                      print('held', flush=True)\nsys.stdin.read()";
        let mut holder = Command::new("python3");
        holder.args(["-c", script]).arg(place.join("etc/a")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = holder.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        let plan = plan_in(&place);
        assert_eq!(
            (changed(&plan), reason(&plan, "a")),
            (vec!["b".to_owned()], (Class::Local, "under a lease of another process"))
        );
        assert_eq!(apply_in(&place, &plan).skipped, []);
        drop(holder.stdin.take());
        holder.wait().unwrap();
    });
}

#[test]
fn another_file_system_without_a_mount_is_not_entered() {
    private(|scratch| {
        let place = on_disk(scratch, "btrfs", 120);
        fs::remove_dir_all(place.join("etc/d")).unwrap();
        run("btrfs", &["-q", "subvolume", "create", place.join("etc/d").to_str().unwrap()]);
        fs::write(place.join("etc/d/x"), text(1)).unwrap();
        let plan = plan_in(&place);
        assert_eq!(
            (changed(&plan), reason(&plan, "d")),
            (vec!["a".to_owned()], (Class::Local, "on another file system"))
        );
        assert_eq!(apply_in(&place, &plan).skipped, []);
        run("umount", &["--lazy", place.to_str().unwrap()]);
    });
}

#[test]
fn directories_nested_too_deeply_are_kept() {
    private(|scratch| {
        let tree = |content| etc([("a", file(content, 0))]);
        let place = stage(scratch, "deep", &[tree(1), tree(2), tree(1)]);
        let mut dir = open_dir(&place.join("etc")).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&dir, "d", rustix::fs::Mode::RWXU).unwrap();
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
            dir = rustix::fs::openat(&dir, "d", flags, rustix::fs::Mode::empty()).unwrap();
        }
        let plan = plan_in(&place);
        assert_eq!(changed(&plan), ["a"]);
        assert_eq!(plan.decisions.last().unwrap().reason, "nested too deeply");
        assert_eq!(apply_in(&place, &plan).skipped, []);
    });
}
