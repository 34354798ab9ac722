#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::super::file::parse;
use super::super::step::{Finished, Refreshed, StagedRoot, Switched, Undo};
use super::super::{FileStep, survives_every_damage};
use super::*;
use node_store::image::{PullSpec, ResolvedImage};
use node_store::import::PulledImage;
use overlay_root::delta::Delta;

pub(crate) fn staged() -> StagedRoot {
    let requested: PullSpec = "r.io/n:t".parse().unwrap();
    let digest = format!("sha256:{}", "0d".repeat(32)).parse().unwrap();
    let image = ResolvedImage { pinned: requested.pinned(digest), requested, digest };
    let pulled = PulledImage {
        image,
        commit: Default::default(),
        booted_commit: None,
        complete: false,
        layers_fetched: 1,
        layers_skipped: 0,
        bytes_fetched: 1,
        objects_written: 1,
        warnings: Vec::new(),
    };
    let delta = Delta { directory: "/x".into(), ..Delta::default() };
    StagedRoot { pulled, delta, plans: BTreeMap::new() }
}

pub(crate) fn refreshed() -> Refreshed {
    Refreshed { staged: staged(), units: Vec::new() }
}

fn undo() -> Undo {
    Undo { tree: staged().into(), units: None, troubles: Vec::new(), salvaged: false }
}

/// Every step, in order.
fn steps() -> Vec<Step> {
    let staged = staged();
    vec![
        Step::Idle,
        Step::NothingToDo { reason: "x".into(), isolated: false },
        Step::Resolved(staged.pulled.image.clone()),
        Step::Pulled(staged.pulled.clone()),
        Step::Staged(staged.clone()),
        Step::Switching(staged.clone()),
        Step::Undoing(undo()),
        Step::Lost { tree: staged.clone().into(), message: "lost".into() },
        Step::Switched(Switched { staged }),
        Step::Refreshed(refreshed()),
        Step::Finished(Finished(refreshed())),
    ]
}

#[test]
fn every_step_survives_the_file_and_rests() {
    use State::{Done, Failed, Idle, NothingToDo, Pulled, Switched};
    let states = [Idle, NothingToDo, Idle, Idle, Pulled, Failed, Failed, Failed, Switched, Switched, Done];
    for (step, state) in steps().into_iter().zip(states) {
        let name = step.name();
        let text = serde_json::to_vec(&Record { step, ..Record::default() }).unwrap();
        assert!(String::from_utf8_lossy(&text).contains(&format!("\"step\":{{\"{name}\"")) || name == "idle", "{name}");
        let mut record: Record = serde_json::from_slice(&text).unwrap();
        assert_eq!(record.step.name(), name);
        record.status.state = State::Running;
        record.rest();
        assert_eq!(record.status.state, state, "{name}");
    }
}

#[test]
fn a_failure_outlives_the_daemon_and_a_planned_attempt_does_not() {
    let error =
        |next_retry_unix| LastError { class: "network".into(), attempt: 2, next_retry_unix, ..LastError::default() };
    let mut record = Record::default();
    record.status.error = Some(error(Some(7)));
    record.rest();
    assert_eq!((record.status.state, record.status.error.clone()), (State::Idle, None));
    record.status.error = Some(error(None));
    record.rest();
    assert_eq!(record.status.state, State::Failed);
    assert!(record.status.error.is_some());
}

#[test]
fn an_interrupted_switch_says_what_to_do() {
    for (step, way_out) in
        [(Step::Switching(staged()), "start node-image-overlay.service again"), (Step::Undoing(undo()), "run it again")]
    {
        let begun = vec![SwitchStep::File(FileStep::Ref), SwitchStep::File(FileStep::Etc)];
        let mut record = Record { step, begun, ..Record::default() };
        record.rest();
        let message = record.status.error.unwrap().message;
        assert!(message.contains("interrupted at the merge of /etc") && message.contains(way_out), "{message}");
    }
}

#[test]
fn a_step_is_listed_before_it_begins() {
    let temp = tempfile::tempdir().unwrap();
    let dir = StateDir::below(temp.path());
    let mut record = Record { step: Step::Switching(staged()), ..Record::default() };
    for step in SwitchStep::all() {
        record.begin(step, &dir).unwrap();
        assert_eq!(Record::load(&dir).unwrap().begun.last(), Some(&step));
    }
    // As an agent that continues after a kill.
    record.begin(SwitchStep::File(FileStep::Usr), &dir).unwrap();
    assert_eq!(Record::load(&dir).unwrap().begun.len(), SwitchStep::all().count());
}

#[test]
fn a_record_of_an_unchanged_system_is_saved_on_a_full_disk() {
    let temp = tempfile::tempdir().unwrap();
    let paths = StateDir::below(temp.path());
    Record { step: Step::Switching(staged()), ..Record::default() }.save(&paths).unwrap();
    failpoint::arm_thread(1, rustix::io::Errno::NOSPC);
    Record { step: Step::Staged(staged()), bootstrap: true, ..Record::default() }.save_over(&paths).unwrap();
    assert!(!failpoint::disarm_thread(), "the first write failed");
    let record = Record::load(&paths).unwrap();
    assert!(record.bootstrap && record.step.is_before_switch());
}

#[test]
fn the_steps_before_the_switch_are_known() {
    let before: Vec<_> = steps().iter().map(Step::is_before_switch).collect();
    assert_eq!(before, [true, true, true, true, true, false, false, false, false, false, false]);
}

#[test]
fn the_bootstrap_flow_ends_at_the_target() {
    let temp = tempfile::tempdir().unwrap();
    let paths = StateDir::below(temp.path());
    let isolated = Step::NothingToDo { reason: "x".into(), isolated: true };
    for step in steps().into_iter().chain([isolated]) {
        let name = step.name();
        let arrives = matches!(step, Step::Finished(_) | Step::NothingToDo { isolated: true, .. });
        let expected = if arrives { (Flow::Live, Goal::Switched) } else { (Flow::Bootstrap, Goal::Finished) };
        let mut record = Record { bootstrap: true, ..Record::default() };
        record.reach(step);
        assert_eq!((record.flow(), record.last_goal()), expected, "{name}");
        // After an undo or a changed request, and a restart of the agent with the generator's variable.
        record.reach(Step::Staged(staged()));
        record.save(&paths).unwrap();
        let mut record = Record::load(&paths).unwrap();
        record.bootstrap |= true;
        assert_eq!((record.flow(), record.last_goal()), expected, "{name}, then staged");
    }
    assert_eq!(Record::default().last_goal(), Goal::Switched);
}

#[test]
fn an_unknown_boot_counts_as_live_and_is_asked_again() {
    for (recorded, boot, known, goal) in [
        (false, Boot::Unknown, false, Goal::Switched),
        (false, Boot::Live, true, Goal::Switched),
        (false, Boot::Bootstrap, true, Goal::Finished),
        // An earlier daemon had the answer. A reload after the switch removes the generator's variable.
        (true, Boot::Unknown, true, Goal::Finished),
        (true, Boot::Live, true, Goal::Finished),
        (true, Boot::Bootstrap, true, Goal::Finished),
    ] {
        let mut record = Record { bootstrap: recorded, ..Record::default() };
        assert_eq!(record.learn(boot), known, "{recorded} {boot:?}");
        assert_eq!(record.last_goal(), goal, "{recorded} {boot:?}");
        // The answer that comes later decides.
        assert!(record.learn(Boot::Bootstrap), "{recorded} {boot:?}");
        assert_eq!(record.last_goal(), Goal::Finished, "{recorded} {boot:?}");
    }
}

#[test]
fn a_request_survives_the_file() {
    let line = "node-image-pivot=force node-image-pivot.image=r.io/n:1";
    let by = |line: &str| Asked::by(&Settings::load_from(std::path::Path::new("/nonexistent"), line).unwrap());
    let asked = by(line);
    assert_eq!(serde_json::from_value::<Asked>(serde_json::to_value(&asked).unwrap()).unwrap(), asked);
    assert_ne!(by(&line.replace("force", "auto")), asked);
}

#[test]
fn every_step_survives_every_damage() {
    for step in steps() {
        survives_every_damage(&Record { step, ..Record::default() });
    }
}

/// A file loads as the saved record or counts as damaged.
#[test]
fn every_changed_byte_is_noticed_or_harmless() {
    let temp = tempfile::tempdir().unwrap();
    let paths = StateDir::below(temp.path());
    Record { step: Step::Finished(Finished(refreshed())), bootstrap: true, ..Record::default() }.save(&paths).unwrap();
    let whole = std::fs::read(temp.path().join(Record::NAME)).unwrap();
    let load = |text: &[u8]| parse::<Record>(text, None, None).map(|record| format!("{record:?}"));
    let saved = load(&whole).unwrap();
    for length in 0..whole.len() {
        assert!(load(&whole[..length]).is_err(), "cut at {length}");
    }
    for (at, byte) in whole.iter().enumerate() {
        for other in [byte ^ 1, byte ^ 0x80, b'0', b'"', b'}', b' '] {
            let mut damaged = whole.clone();
            damaged[at] = other;
            match load(&damaged) {
                Ok(record) => assert_eq!(record, saved, "{at}: {other}"),
                Err(damage) => assert!(!damage.to_string().is_empty()),
            }
        }
    }
}
