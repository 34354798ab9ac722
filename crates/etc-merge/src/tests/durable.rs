//! Power cuts: a copy of the disk, made directly after a change, has each file with its old or its new content.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::real::{rescan, write_tree};
use super::*;
use support::directory::Directory;
use support::failpoint::{arm_thread, disarm_thread};
use support::testing::private;

/// Changes of every type to files with several pages of content.
fn trees() -> [Snapshot; 3] {
    let base = etc([
        ("changed", file(7, 0)),
        ("gone", file(5, 0)),
        ("d", dir(0, [("changed", file(6, 0)), ("gone", file(3, 0))])),
        ("gone-dir", dir(0, [("inside", file(4, 0))])),
        ("file-to-dir", file(5, 0)),
        ("dir-to-file", dir(0, [("inside", file(3, 0))])),
        ("link-to-file", link(1)),
        ("file-to-link", file(2, 0)),
        ("mode", file(3, 0)),
    ]);
    let new = etc([
        ("changed", file(6, 2)),
        ("added", file(7, 1)),
        ("d", dir(0, [("changed", file(5, 0)), ("added", file(4, 0))])),
        ("added-dir", dir(1, [("inside", file(6, 0))])),
        ("file-to-dir", dir(0, [("inside", file(4, 0))])),
        ("dir-to-file", file(4, 0)),
        ("link-to-file", file(5, 0)),
        ("file-to-link", link(2)),
        ("mode", file(3, 2)),
    ]);
    [base.clone(), new, base]
}

pub(super) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A disk with the `etc` from before the merge, and a directory for the undo journal outside of that disk.
struct Bench {
    scratch: PathBuf,
    fstype: &'static str,
}

impl Bench {
    fn new(scratch: &Path, fstype: &'static str, mib: u64, trees: &[Snapshot; 3]) -> Self {
        let bench = Self { scratch: scratch.join(fstype), fstype };
        fs::create_dir_all(bench.disk()).unwrap();
        fs::File::create(bench.image("pristine")).unwrap().set_len(mib << 20).unwrap();
        run(&format!("mkfs.{fstype}"), &["-q", bench.image("pristine").to_str().unwrap()]);
        bench.mounted("pristine", || {
            write_tree(&bench.disk().join("etc"), &trees[2]);
            fs::write(bench.disk().join("other"), "").unwrap();
        });
        write_tree(&bench.scratch.join("base"), &trees[0]);
        write_tree(&bench.scratch.join("new"), &trees[1]);
        bench
    }

    fn disk(&self) -> PathBuf {
        self.scratch.join("disk")
    }

    fn image(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.img"))
    }

    fn copy(&self, from: &str, to: &str) {
        run("cp", &["--sparse=always", self.image(from).to_str().unwrap(), self.image(to).to_str().unwrap()]);
    }

    fn mounted<T>(&self, name: &str, act: impl FnOnce() -> T) -> T {
        if self.fstype == "btrfs" {
            // btrfs identifies file systems by an id, which copies share.
            run("btrfs", &["device", "scan", "--forget"]);
        }
        run("mount", &["-o", "loop", self.image(name).to_str().unwrap(), self.disk().to_str().unwrap()]);
        let done = act();
        // A child process of another test can have the directories open, between its fork and its exec.
        let end = Instant::now() + Duration::from_secs(120);
        while !Command::new("umount").arg(self.disk()).output().unwrap().status.success() {
            assert!(Instant::now() < end, "{} is still busy", self.disk().display());
            std::thread::sleep(Duration::from_millis(20));
        }
        done
    }

    /// Makes the plan on a new copy of the disk, calls `act`, copies the disk again and returns the `etc` on that copy.
    fn after(&self, act: impl FnOnce(&Sides)) -> Snapshot {
        self.copy("pristine", "disk");
        let _ = fs::remove_dir_all(self.scratch.join("state"));
        self.mounted("disk", || {
            let [base, new, etc] = ["base", "new", "disk/etc"].map(|name| open_dir(&self.scratch.join(name)).unwrap());
            let plan = plan(base.as_fd(), new.as_fd(), etc.as_fd(), &Defaults::default()).unwrap();
            act(&Sides { plan, new, etc, undo: self.scratch.join("state/undo"), other: self.disk().join("other") });
            self.copy("disk", "cut");
        });
        self.mounted("cut", || rescan(&self.disk().join("etc")))
    }
}

struct Sides {
    plan: Plan,
    new: std::os::fd::OwnedFd,
    etc: std::os::fd::OwnedFd,
    undo: PathBuf,
    other: PathBuf,
}

impl Sides {
    fn apply(&self) -> anyhow::Result<Report> {
        apply(&self.plan, self.new.as_fd(), self.etc.as_fd(), &self.undo)
    }

    fn undo(&self) -> anyhow::Result<UndoReport> {
        undo(&self.undo, self.etc.as_fd())
    }

    /// Syncs a file of another process. This writes the log of the file system with the renames so far, but no content
    /// of the merge.
    fn sync_from_another_process(&self) {
        let mut other = fs::File::options().append(true).open(&self.other).unwrap();
        other.write_all(b"x").unwrap();
        other.sync_all().unwrap();
    }

    /// Calls `act` and makes its failpoint hit `number` fail. Returns true if there was such a hit.
    fn cut_at(&self, number: usize, act: impl FnOnce(&Self) -> bool) -> bool {
        arm_thread(number, Errno::IO);
        let done = act(self);
        let passed = disarm_thread();
        assert_eq!(done, passed, "failure {number} is not reported");
        self.sync_from_another_process();
        !passed
    }
}

/// Asserts that each file has its old or its new content.
fn assert_old_or_new(cut: &Snapshot, old: &Snapshot, new: &Snapshot, when: &str) {
    let [cut, old, new] = [cut, old, new].map(flat);
    let content = |side: &BTreeMap<Bytes, Leaf>, path: &Bytes| side.get(path).map(|leaf| leaf.content.clone());
    let paths: std::collections::BTreeSet<&Bytes> = [&cut, &old, &new].into_iter().flat_map(BTreeMap::keys).collect();
    for path in paths {
        let (now, before, after) = (content(&cut, path), content(&old, path), content(&new, path));
        // A directory is removed before the file that replaces it is created.
        let gap = now.is_none() && [&before, &after].contains(&&Some(Content::Directory));
        assert!(now == before || now == after || gap, "{when}: {path} is {now:?}, not {before:?} or {after:?}");
    }
}

fn check_power_cuts(fstype: &'static str, mib: u64) {
    private(|scratch| {
        let trees = trees();
        let bench = Bench::new(scratch, fstype, mib, &trees);
        let merged = outcome(&decide(&trees[0], &trees[1], &trees[2]), &trees[2]);

        let cut = bench.after(|sides| drop(sides.apply().unwrap()));
        assert_eq!(cut, merged, "the merge returned before its result was on the disk");
        let cut = bench.after(|sides| {
            sides.apply().unwrap();
            sides.undo().unwrap();
        });
        assert_eq!(cut, trees[2], "the undo returned before its result was on the disk");

        for undoing in [false, true] {
            let mut more = true;
            for number in (0..).step_by(7) {
                let cut = bench.after(|sides| {
                    if undoing {
                        sides.apply().unwrap();
                    }
                    more = sides.cut_at(number, |sides| match undoing {
                        false => sides.apply().is_ok(),
                        true => sides.undo().is_ok_and(|report| report.failed.is_empty()),
                    });
                });
                assert_old_or_new(&cut, &trees[2], &merged, &format!("{fstype}, act {number}, undoing: {undoing}"));
                if !more {
                    assert!(number > 60, "only {number} acts");
                    break;
                }
            }
        }
    });
}

#[test]
fn a_power_cut_on_xfs_leaves_old_or_new_content() {
    check_power_cuts("xfs", 300);
}

#[test]
fn a_power_cut_on_ext4_leaves_old_or_new_content() {
    check_power_cuts("ext4", 32);
}

#[test]
fn a_power_cut_on_btrfs_leaves_old_or_new_content() {
    check_power_cuts("btrfs", 120);
}

#[test]
fn a_record_survives_a_power_cut_directly_after_it_is_written() {
    private(|scratch| {
        for (fstype, mib) in [("xfs", 300), ("ext4", 32), ("btrfs", 120)] {
            let bench = Bench::new(scratch, fstype, mib, &trees());
            let content = vec![b'r'; 3 * 4096];
            bench.after(|_| {
                let records = Directory::ensure(&bench.disk().join("etc")).unwrap();
                records.write_durable("record", 0o600, &content).unwrap();
            });
            let found = bench.mounted("cut", || fs::read(bench.disk().join("etc/record")).unwrap());
            assert!(found == content, "{fstype}: the record is incomplete");
        }
    });
}
