//! What is remembered between phases, in `/run/node-image-pivot/state.json`.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Goal, Paths, Probation};
use crate::config::{ImageSource, Settings};
use crate::dirfd::Directory;
use crate::failpoint::{self, Point};
use crate::image::ResolvedImage;
use crate::import::PulledImage;
use crate::report::{LastError, State, Status, human_bytes};
use crate::stage::Delta;
use crate::units::{Action, Flow};

/// Version of the record's format. A record of another version is refused, not guessed at.
const SCHEMA: u32 = 1;
const FILE: &str = "state.json";

/// What the settings ask for, to be compared: another answer makes everything before the switch stale.
pub(super) fn asked(settings: &Settings) -> String {
    let source = match &settings.image {
        Some(ImageSource::Image(spec)) => format!("image {spec}"),
        Some(ImageSource::Release(spec)) => format!("release {spec} {}", settings.image_tags.join(" ")),
        None => "nothing".to_owned(),
    };
    let complete = if settings.complete { " complete" } else { "" };
    format!("{:?} {:?} {:?} {source}{complete}", settings.mode, settings.etc_strategy, settings.store)
}

/// What the status document shows as the image asked for.
pub(super) fn shown(settings: &Settings) -> Option<String> {
    settings.image.as_ref().map(|source| match source {
        ImageSource::Image(spec) | ImageSource::Release(spec) => spec.clone(),
    })
}

/// Everything that the switch needs, decided and checked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StagedRoot {
    /// What was pulled.
    pub pulled: PulledImage,
    /// The delta tree.
    pub delta: Delta,
    /// One line per class of the `/etc` plan, conflicts by name.
    pub etc: Vec<String>,
}

impl StagedRoot {
    /// The plan for a person.
    pub fn plan_lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("node image {} (commit {})", self.pulled.image.pinned, self.pulled.commit),
            format!(
                "/usr: {} added, {} changed, {} removed; {} differ",
                self.delta.counts.added,
                self.delta.counts.changed,
                self.delta.counts.removed,
                human_bytes(self.delta.counts.added_bytes + self.delta.counts.changed_bytes)
            ),
        ];
        lines.extend(self.etc.iter().map(|line| format!("/etc: {line}")));
        lines.extend(self.pulled.warnings.iter().map(|line| format!("warning: {line}")));
        lines
    }
}

/// What was switched, and what was decided about the units that ran then.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Switched {
    /// What was staged.
    pub staged: StagedRoot,
    /// Decisions about running units; filled by refresh.
    #[serde(default)]
    pub units: Vec<Action>,
}

/// An undo that has begun. What it has to do is written down before the first act: afterwards nobody
/// can tell what ran the node image's code.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Undo {
    /// What was switched to.
    pub staged: StagedRoot,
    /// Decisions about running units; absent when a failed switch is rolled back, before any unit saw it.
    pub units: Option<Vec<Action>>,
}

/// Where the pivot stands. The value of each step is what the next phase takes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Nothing done.
    #[default]
    Idle,
    /// The system already is what it should become.
    NothingToDo {
        /// What told us.
        reason: String,
        /// Whether the machine was sent on to its default target.
        isolated: bool,
    },
    /// The digest is known.
    Resolved(ResolvedImage),
    /// The objects are stored.
    Pulled(PulledImage),
    /// The delta tree and the plans are made; the running system is untouched.
    Staged(StagedRoot),
    /// The switch has begun and may be half done.
    Switching(StagedRoot),
    /// It is being taken back, and that may be half done.
    Undoing(Undo),
    /// `/usr` and `/etc` are the node image's.
    Switched(Switched),
    /// What runs is, too.
    Refreshed(Switched),
    /// Isolated.
    Finished(Switched),
}

impl Step {
    /// For the journal.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Idle => "idle",
            Step::NothingToDo { .. } => "nothing-to-do",
            Step::Resolved(_) => "resolved",
            Step::Pulled(_) => "pulled",
            Step::Staged(_) => "staged",
            Step::Switching(_) => "switching",
            Step::Undoing(_) => "undoing",
            Step::Switched(_) => "switched",
            Step::Refreshed(_) => "refreshed",
            Step::Finished(_) => "finished",
        }
    }

    /// Whether the running system is untouched.
    pub fn is_before_switch(&self) -> bool {
        matches!(self, Step::Idle | Step::NothingToDo { .. } | Step::Resolved(_) | Step::Pulled(_) | Step::Staged(_))
    }

    /// Whether the machine was sent on to its target.
    fn is_arrival(&self) -> bool {
        matches!(self, Step::Finished(_) | Step::NothingToDo { isolated: true, .. })
    }

    /// The state in which nothing runs.
    fn resting_state(&self) -> State {
        match self {
            Step::Idle | Step::Resolved(_) | Step::Pulled(_) => State::Idle,
            Step::NothingToDo { .. } => State::NothingToDo,
            Step::Staged(_) => State::Pulled,
            Step::Switching(_) | Step::Undoing(_) => State::Failed,
            Step::Switched(_) | Step::Refreshed(_) => State::Switched,
            Step::Finished(_) => State::Done,
        }
    }
}

/// The record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    schema: u32,
    /// How far the pivot is.
    pub step: Step,
    /// Whether the generator redirected this boot.
    #[serde(default)]
    pub bootstrap: bool,
    /// Whether the machine has gone on to its target: it is in use from then on, whatever is undone and done again.
    #[serde(default)]
    arrived: bool,
    /// What the configuration asked for when the step was reached.
    #[serde(default)]
    pub asked: Option<String>,
    /// When the switch is undone unless somebody keeps it.
    #[serde(default)]
    pub probation: Option<Probation>,
    /// What the last undo left on purpose, until the next switch: whoever asks again is told again.
    #[serde(default)]
    pub undone: Option<Vec<String>>,
    /// The status document as it was last saved.
    pub status: Status,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            schema: SCHEMA,
            step: Step::Idle,
            bootstrap: false,
            arrived: false,
            asked: None,
            probation: None,
            undone: None,
            status: Status::default(),
        }
    }
}

impl Record {
    /// The record under `paths`; a fresh one when there is none.
    pub fn load(paths: &Paths) -> Result<Self> {
        let dir = Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
        let shown = paths.run().join(FILE);
        let Some(text) = dir.read_optional(FILE).with_context(|| format!("cannot read {}", shown.display()))? else {
            return Ok(Self::default());
        };
        let mut record: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged; nothing was touched; reboot to begin anew", shown.display()))?;
        if record.schema != SCHEMA {
            bail!(
                "{} has format {}, this agent knows {SCHEMA}; go on with the agent that wrote it, or reboot to begin anew",
                shown.display(),
                record.schema
            );
        }
        // An older agent did not say so.
        record.arrived |= record.step.is_arrival();
        Ok(record)
    }

    /// Replaces the file in one step.
    pub fn save(&self, paths: &Paths) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context("cannot write the record")?;
        failpoint::hit(Point::Record, self.step.name())
            .and_then(|()| Directory::ensure(paths.run()))
            .and_then(|dir| dir.write_atomic(FILE, 0o600, &text))
            .with_context(|| format!("cannot write {}", paths.run().join(FILE).display()))
    }

    /// The same, for a record that says that the running system is untouched. Where there is no room for
    /// it, the old one goes first: whoever finds none begins anew, whoever finds the old one would not.
    pub fn save_over(&self, paths: &Paths) -> Result<()> {
        self.save(paths).or_else(|_| {
            Directory::ensure(paths.run())
                .and_then(|dir| dir.remove_all(FILE))
                .with_context(|| format!("cannot remove {}", paths.run().join(FILE).display()))?;
            self.save(paths)
        })
    }

    /// The status that is true when nobody works: for a daemon that was just started.
    pub fn rest(&mut self) {
        // A failure stays until somebody tries again; a planned attempt went with the daemon.
        let failed = self.status.error.as_ref().is_some_and(|error| error.next_retry_unix.is_none());
        let interrupted = match self.step {
            Step::Switching(_) => {
                Some("the switch was interrupted: start node-image-overlay.service again to finish it, or run undo")
            }
            Step::Undoing(_) => Some("undo was interrupted: run it again"),
            _ => None,
        };
        if let Some(message) = interrupted {
            self.status.error.get_or_insert_with(|| LastError {
                class: "interrupted".into(),
                message: message.into(),
                attempt: 1,
                next_retry_unix: None,
            });
        } else if !failed {
            self.status.error = None;
        }
        self.status.state = if failed { State::Failed } else { self.step.resting_state() };
    }

    /// Goes on to `step`.
    pub fn reach(&mut self, step: Step) {
        self.arrived |= step.is_arrival();
        self.step = step;
    }

    /// In which flow the pivot runs: the bootstrap flow ends where the machine goes on to its target.
    pub fn flow(&self) -> Flow {
        if self.bootstrap && !self.arrived { Flow::Bootstrap } else { Flow::Live }
    }

    /// How far a run goes. The isolate belongs to the bootstrap flow only: on a system in use, nothing that runs may
    /// be stopped.
    pub fn last_goal(&self) -> Goal {
        match self.flow() {
            Flow::Bootstrap => Goal::Finished,
            Flow::Live => Goal::Switched,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::image::ResolvedImage;
    use crate::stage::DeltaCounts;

    fn staged() -> StagedRoot {
        let image =
            ResolvedImage { requested: "r/n:t".into(), pinned: "r/n@sha256:x".into(), digest: "sha256:x".into() };
        let pulled = PulledImage {
            image,
            commit: "c".into(),
            booted_commit: None,
            complete: false,
            layers_fetched: 1,
            layers_skipped: 0,
            bytes_fetched: 1,
            objects_written: 1,
            warnings: Vec::new(),
        };
        let delta = Delta { directory: "/x".into(), counts: DeltaCounts::default() };
        StagedRoot { pulled, delta, etc: Vec::new() }
    }

    fn undo() -> Undo {
        Undo { staged: staged(), units: None }
    }

    /// Every step, in order.
    fn steps() -> Vec<Step> {
        let staged = staged();
        let switched = Switched { staged: staged.clone(), units: Vec::new() };
        vec![
            Step::Idle,
            Step::NothingToDo { reason: "x".into(), isolated: false },
            Step::Resolved(staged.pulled.image.clone()),
            Step::Pulled(staged.pulled.clone()),
            Step::Staged(staged.clone()),
            Step::Switching(staged.clone()),
            Step::Undoing(undo()),
            Step::Switched(switched.clone()),
            Step::Refreshed(switched.clone()),
            Step::Finished(switched),
        ]
    }

    #[test]
    fn every_step_survives_the_file_and_rests() {
        use State::{Done, Failed, Idle, NothingToDo, Pulled, Switched};
        let states = [Idle, NothingToDo, Idle, Idle, Pulled, Failed, Failed, Switched, Switched, Done];
        for (step, state) in steps().into_iter().zip(states) {
            let name = step.name();
            let text = serde_json::to_vec(&Record { step, ..Record::default() }).unwrap();
            let mut record: Record = serde_json::from_slice(&text).unwrap();
            assert_eq!(record.step.name(), name);
            record.status.state = State::Running;
            record.rest();
            assert_eq!(record.status.state, state, "{name}");
        }
    }

    #[test]
    fn a_failure_outlives_the_daemon_and_a_planned_attempt_does_not() {
        let error = |next_retry_unix| LastError {
            class: "network".into(),
            message: "refused".into(),
            attempt: 2,
            next_retry_unix,
        };
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
        for (step, way_out) in [
            (Step::Switching(staged()), "start node-image-overlay.service again"),
            (Step::Undoing(undo()), "run it again"),
        ] {
            let mut record = Record { step, ..Record::default() };
            record.rest();
            assert!(record.status.error.unwrap().message.contains(way_out));
        }
    }

    #[test]
    fn a_record_that_says_untouched_replaces_one_that_does_not_whatever_happens() {
        let temp = tempfile::tempdir().unwrap();
        let paths = Paths::below(temp.path());
        Record { step: Step::Switching(staged()), ..Record::default() }.save(&paths).unwrap();
        failpoint::fail_here(Some((1, rustix::io::Errno::NOSPC)));
        Record { step: Step::Staged(staged()), bootstrap: true, ..Record::default() }.save_over(&paths).unwrap();
        assert!(!failpoint::fail_here(None), "the first write failed");
        let record = Record::load(&paths).unwrap();
        assert!(record.bootstrap && record.step.is_before_switch());
    }

    #[test]
    fn what_comes_before_the_switch() {
        let before: Vec<_> = steps().iter().map(Step::is_before_switch).collect();
        assert_eq!(before, [true, true, true, true, true, false, false, false, false, false]);
    }

    #[test]
    fn the_bootstrap_flow_ends_at_the_target() {
        let temp = tempfile::tempdir().unwrap();
        let paths = Paths::below(temp.path());
        let isolated = Step::NothingToDo { reason: "x".into(), isolated: true };
        for step in steps().into_iter().chain([isolated]) {
            let name = step.name();
            let arrives = matches!(step, Step::Finished(_) | Step::NothingToDo { isolated: true, .. });
            let expected = if arrives { (Flow::Live, Goal::Switched) } else { (Flow::Bootstrap, Goal::Finished) };
            let mut record = Record { bootstrap: true, ..Record::default() };
            record.reach(step.clone());
            assert_eq!((record.flow(), record.last_goal()), expected, "{name}");
            // Undone, or asked for another image; over a restart of the agent that sees the generator's variable again.
            record.reach(Step::Staged(staged()));
            record.save(&paths).unwrap();
            let mut record = Record::load(&paths).unwrap();
            record.bootstrap |= true;
            assert_eq!((record.flow(), record.last_goal()), expected, "{name}, then staged");
            // As an agent leaves it that does not know better.
            Record { step, bootstrap: true, ..Record::default() }.save(&paths).unwrap();
            assert_eq!(Record::load(&paths).unwrap().flow(), expected.0, "{name}, of an older agent");
        }
        assert_eq!(Record::default().last_goal(), Goal::Switched);
    }

    #[test]
    fn a_foreign_record_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let paths = Paths::below(temp.path());
        assert!(matches!(Record::load(&paths).unwrap().step, Step::Idle));
        Record::default().save(&paths).unwrap();
        assert!(matches!(Record::load(&paths).unwrap().step, Step::Idle));
        std::fs::write(temp.path().join(FILE), "{").unwrap();
        assert!(Record::load(&paths).unwrap_err().to_string().contains("damaged"));
        let newer = Record { schema: SCHEMA + 1, ..Record::default() };
        newer.save(&paths).unwrap();
        assert!(Record::load(&paths).unwrap_err().to_string().contains("format 2"));
    }
}
