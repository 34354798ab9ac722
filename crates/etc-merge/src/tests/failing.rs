//! Each failpoint of a merge and of an undo fails once with each error, and kills the process once. Afterwards, a
//! repeated call completes the merge, and an undo restores the old state. The killed process is this test program.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;

use super::real::{beyond, plan_in, rescan, stage, undo_in};
use super::*;
use support::failpoint::{arm_thread, disarm_thread};
use support::testing::private;

/// Environment variables for [`killed_child`]: its directory, and whether it undoes.
const PLACE: &str = "NODE_IMAGE_PIVOT_TEST_PLACE";
const UNDO: &str = "NODE_IMAGE_PIVOT_TEST_UNDO";

/// Changes of each type to each type of entry.
fn trees() -> [Snapshot; 3] {
    let common = || {
        vec![
            ("changed", file(1, 0)),
            ("changed-mode", file(1, 0)),
            ("conflict", file(1, 0)),
            ("gone", file(1, 0)),
            ("gone-dir", dir(0, [("inside", file(1, 0))])),
            ("link", link(0)),
            ("dir-meta", dir(0, [("deep", file(3, 0))])),
            ("file-to-dir", file(1, 0)),
            ("dir-to-file", dir(0, [])),
            ("link-to-file", link(0)),
        ]
    };
    let base = etc(common());
    let mut current = base.clone();
    current.root.children.insert(b"conflict".to_vec(), file(3, 0));
    current.root.children.insert(b"local".to_vec(), file(4, 2));
    let new = etc([
        ("changed", file(2, 2)),
        ("changed-mode", file(1, 2)),
        ("conflict", file(2, 0)),
        ("link", link(1)),
        ("dir-meta", dir(2, [("deep", file(5, 1))])),
        ("file-to-dir", dir(1, [("inside", file(2, 0))])),
        ("dir-to-file", file(2, 1)),
        ("link-to-file", file(2, 0)),
        ("added", file(6, 2)),
        ("added-dir", dir(1, [("inside", link(1))])),
    ]);
    [base, new, current]
}

fn try_apply(place: &Path) -> anyhow::Result<Report> {
    let plan: Plan = serde_json::from_slice(&fs::read(place.join("plan.json"))?)?;
    let [new, etc] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    apply(&plan, new.as_fd(), etc.as_fd(), &place.join("state/undo"))
}

fn try_undo(place: &Path) -> anyhow::Result<UndoReport> {
    undo(&place.join("state/undo"), open_dir(&place.join("etc"))?.as_fd())
}

/// A directory with the three trees and their plan, and the state of `etc` before and after the merge.
struct Case {
    place: PathBuf,
    before: (Snapshot, BTreeMap<PathBuf, (Vec<u8>, i64)>),
    after: Snapshot,
}

impl Case {
    fn new(scratch: &Path, name: &str) -> Self {
        let trees = trees();
        let place = stage(scratch, name, &trees);
        let plan = plan_in(&place);
        fs::write(place.join("plan.json"), serde_json::to_vec(&plan).unwrap()).unwrap();
        let before = (rescan(&place.join("etc")), beyond(&place.join("etc")));
        Self { before, after: outcome(&plan, &trees[2]), place }
    }

    fn assert_applied(&self) {
        assert_eq!(rescan(&self.place.join("etc")), self.after, "{}", self.place.display());
    }

    /// Asserts that `etc` is unchanged, including labels and times, and that no files of the merge are left.
    fn assert_restored(&self) {
        let etc = self.place.join("etc");
        assert_eq!((rescan(&etc), beyond(&etc)), self.before, "{}", self.place.display());
        let left: Vec<_> = fs::read_dir(&etc)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.as_encoded_bytes().starts_with(b".node-image-pivot"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(!self.place.join("state/undo/plan.json").exists());
        assert!(!self.place.join("state/etc-new").exists());
    }

    fn undo_and_assert_restored(self) {
        let report = undo_in(&self.place);
        assert_eq!((report.kept, report.failed), (vec![], vec![]), "{}", self.place.display());
        self.assert_restored();
        fs::remove_dir_all(&self.place).unwrap();
    }
}

#[test]
fn each_write_fails_while_applying() {
    private(|scratch| {
        for errno in [Errno::NOSPC, Errno::IO] {
            let words = std::io::Error::from(errno).to_string();
            for number in 0.. {
                let name = |what: &str| format!("apply-{}-{number}-{what}", errno.raw_os_error());
                let failed = |case: &Case| {
                    arm_thread(number, errno);
                    let outcome = try_apply(&case.place);
                    let all_passed = disarm_thread();
                    let Err(error) = outcome else {
                        assert!(all_passed, "failure {number} went unnoticed");
                        return false;
                    };
                    assert!(format!("{error:#}").contains(&words), "{error:#}");
                    true
                };
                let case = Case::new(scratch, &name("undo"));
                if !failed(&case) {
                    assert!(number > 60, "only {number} failpoints were hit");
                    break;
                }
                case.undo_and_assert_restored();
                let case = Case::new(scratch, &name("finish"));
                assert!(failed(&case));
                assert_eq!(try_apply(&case.place).unwrap().skipped, vec![]);
                case.assert_applied();
                case.undo_and_assert_restored();
            }
        }
    });
}

#[test]
fn each_write_fails_while_undoing() {
    private(|scratch| {
        for errno in [Errno::NOSPC, Errno::IO] {
            for number in 0.. {
                let case = Case::new(scratch, &format!("undo-{}-{number}", errno.raw_os_error()));
                try_apply(&case.place).unwrap();
                arm_thread(number, errno);
                let outcome = try_undo(&case.place);
                if disarm_thread() {
                    case.assert_restored();
                    assert!(number > 60, "only {number} failpoints were hit");
                    break;
                }
                let messages = match outcome {
                    Ok(report) => {
                        assert_eq!(report.kept, vec![], "{number}");
                        report.failed.into_iter().map(|entry| entry.reason).collect()
                    }
                    Err(error) => vec![format!("{error:#}")],
                };
                let words = std::io::Error::from(errno).to_string();
                assert!(messages.len() == 1 && messages[0].contains(&words), "{number}: {messages:?}");
                case.undo_and_assert_restored();
            }
        }
    });
}

/// Runs [`killed_child`] for `case`, armed to be killed at failpoint hit `number`. Returns true if it was killed.
fn killed(case: &Case, undo: bool, number: usize) -> bool {
    let points = case.place.join("points");
    fs::create_dir_all(&points).unwrap();
    fs::write(points.join("armed"), format!("* {number} kill\n")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "tests::failing::killed_child", "--nocapture", "--test-threads=1"]);
    child.env(PLACE, &case.place).env("NODE_IMAGE_PIVOT_FAILPOINTS", &points);
    if undo {
        child.env(UNDO, "1");
    }
    let output = child.output().unwrap();
    match output.status.signal() {
        Some(9) => true,
        _ => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            assert!(points.join("armed").exists());
            false
        }
    }
}

#[test]
fn killed_child() {
    let Some(place) = std::env::var_os(PLACE) else { return };
    if std::env::var_os(UNDO).is_some() {
        let report = try_undo(Path::new(&place)).unwrap();
        assert_eq!((report.kept, report.failed), (vec![], vec![]));
    } else {
        try_apply(Path::new(&place)).unwrap();
    }
}

#[test]
fn killed_at_each_act_while_applying() {
    private(|scratch| {
        for number in 0.. {
            let case = Case::new(scratch, &format!("kill-{number}"));
            if !killed(&case, false, number) {
                case.assert_applied();
                assert!(number > 60, "only {number} failpoints were hit");
                break;
            }
            // Every second merge is completed before the undo.
            if number % 2 == 0 {
                assert_eq!(try_apply(&case.place).unwrap().skipped, vec![]);
                case.assert_applied();
            }
            case.undo_and_assert_restored();
        }
    });
}

#[test]
fn killed_at_each_act_while_undoing() {
    private(|scratch| {
        for number in 0.. {
            let case = Case::new(scratch, &format!("kill-undo-{number}"));
            try_apply(&case.place).unwrap();
            if !killed(&case, true, number) {
                case.assert_restored();
                assert!(number > 60, "only {number} failpoints were hit");
                break;
            }
            case.undo_and_assert_restored();
        }
    });
}

/// A damaged line hides no other line, and the content of its own change is restored too.
#[test]
fn a_damaged_journal_does_not_keep_content_from_being_undone() {
    private(|scratch| {
        let lines = {
            let case = Case::new(scratch, "whole");
            try_apply(&case.place).unwrap();
            let journal = fs::read_to_string(case.place.join("state/undo/journal")).unwrap();
            journal.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        for damaged in 0..lines.len() {
            let case = Case::new(scratch, &format!("line{damaged}"));
            try_apply(&case.place).unwrap();
            let mut lines = lines.clone();
            lines[damaged] = "garbage".into();
            fs::write(case.place.join("state/undo/journal"), lines.join("\n") + "\n").unwrap();
            assert!(try_apply(&case.place).is_err(), "a merge continued with a damaged journal");
            let report = try_undo(&case.place).unwrap();
            assert!(report.failed.is_empty() && report.kept.is_empty(), "line {damaged}: {report:?}");
            assert_eq!(report.damaged, 1);
            assert_eq!(rescan(&case.place.join("etc")), case.before.0, "line {damaged}");
        }
        for (cut, name) in [("", "empty"), ("garbage\n", "garbage"), (&*format!("{}\n", lines[0]), "short")] {
            let case = Case::new(scratch, name);
            try_apply(&case.place).unwrap();
            fs::write(case.place.join("state/undo/journal"), cut).unwrap();
            let report = try_undo(&case.place).unwrap();
            assert!(report.damaged > 0, "{name}");
            assert_eq!(rescan(&case.place.join("etc")), case.before.0, "{name}: {report:?}");
        }
    });
}
