//! Carries out the unit plan, with a journal, so that the next agent after a kill repeats no completed job.
//!
//! `units.json` in the agent's directory holds the units before the switch, and each action with its completed jobs.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::new_usr::ChangedPaths;
use super::state::{StateFile, if_present};
use super::unit_survey::{UnitSettings, unit_files};
use super::{Error, StagedRoot, StateDir};
use crate::report::{Subject, Tracker};
use unit_refresh::{Action, Class, Definitions, Flow, Manager, Root, Sides, Verb, Version};

/// One action and its progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Act {
    action: Action,
    /// Number of its jobs that have ended, with or without success.
    done: usize,
    /// True if one of them failed.
    failed: bool,
    /// Invocation of the unit that the restart must end, in hexadecimal. Another invocation means that it was restarted
    /// already, by an earlier agent or as a dependent of another unit.
    ending: Option<String>,
}

impl From<Action> for Act {
    fn from(action: Action) -> Self {
        Self { action, done: 0, failed: false, ending: None }
    }
}

/// The record of the units, from before the switch until the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnitsRecord {
    /// Definitions of the units that were active. Restarted and stopped units are removed.
    before: Definitions,
    /// The sockets that the final target pulled in; absent if the record was lost.
    sockets: Option<BTreeSet<String>>,
    /// The flow that was planned for; absent until there is a plan.
    pub(super) flow: Option<Flow>,
    acts: Vec<Act>,
}

impl StateFile for UnitsRecord {
    const NAME: &'static str = "units.json";
    const SUBJECT: &'static str = "the journal of the unit plan";
    const REMEDY: &'static str = "remove it, then only the running code of units is compared";
}

impl UnitsRecord {
    /// Returns those of `pulled_in` that the booted system lacked; none if it is unknown which it had.
    fn added_sockets(&self, pulled_in: BTreeSet<String>) -> BTreeSet<String> {
        self.sockets.as_ref().map_or_else(BTreeSet::new, |known| pulled_in.difference(known).cloned().collect())
    }

    /// Returns the units that the switch stopped; an undo starts them again.
    pub(super) fn stopped(&self) -> impl Iterator<Item = &str> {
        let done = self.acts.iter().filter(|act| act.action.class == Class::Stop && act.done > 0);
        done.map(|act| act.action.unit.as_str())
    }
}

/// Records the units before the first act of the switch.
pub(super) async fn remember(dir: &StateDir, target: &str, staged: &StagedRoot) -> Result<(), Error> {
    let remembered = async {
        let files = unit_files().await?;
        let before = unit_refresh::definitions(&Manager::connect().await?, &files).await?;
        let mut sockets = files.pulled_in(target);
        sockets.retain(|name| name.ends_with(".socket"));
        staged.save(&UnitsRecord { before, sockets: Some(sockets), ..UnitsRecord::default() }, dir)
    };
    remembered.await.map(drop).map_err(Error::from)
}

/// The input of the plan for the running units, and of the other steps of the refresh.
pub(super) struct UnitPlan<'a> {
    pub(super) tracker: &'a Tracker,
    pub(super) dir: &'a StateDir,
    pub(super) settings: &'a UnitSettings,
    pub(super) staged: &'a StagedRoot,
    pub(super) changed: &'a ChangedPaths,
    pub(super) flow: Flow,
}

/// Plans for the flow once and carries the plan out; after a kill, continues after the last completed job. Returns the
/// actions that succeeded. Adds a line to `trouble` for each failure of a unit.
///
/// # Errors
/// The record cannot be read or written, or systemd does not answer.
pub(super) async fn carry_out(
    &UnitPlan { tracker, dir, settings, staged, changed, flow }: &UnitPlan<'_>,
    manager: &mut Manager,
    trouble: &mut Vec<String>,
) -> Result<Vec<Action>> {
    // Without it, only the running code of units is compared.
    let mut record = if_present(staged.load::<UnitsRecord>(dir))?.unwrap_or_default();
    let save = |record: &UnitsRecord| staged.save(record, dir).map(drop);
    if record.flow != Some(flow) {
        let new = unit_files().await?;
        let added = record.added_sockets(new.pulled_in(&settings.target));
        let systemd = Root::running().systemd_release();
        let differs = |path: &Path| changed.contains(path);
        let (version, old, differs) = (Version::Replaced, &record.before, &differs);
        let sides = Sides { version, differs, old, new: &new, added: &added, systemd };
        let (states, troubles) = match unit_refresh::survey(manager, &sides).await {
            // Another process re-executed systemd.
            Err(error) if Manager::is_lost(&error) => {
                *manager = Manager::connect().await?;
                unit_refresh::survey(manager, &sides).await?
            }
            surveyed => surveyed?,
        };
        trouble.extend(troubles);
        // Actions for the earlier flow that have begun stay in the report.
        record.acts.retain(|act| act.done > 0);
        for action in unit_refresh::plan(&states, flow, &settings.policy) {
            let mut act = Act::from(action);
            if act.action.jobs().iter().any(|(verb, _)| *verb == Verb::TryRestart) {
                act.ending = manager.invocation(&act.action.unit).await.ok().map(hex::encode);
            }
            record.acts.push(act);
        }
        record.flow = Some(flow);
        save(&record)?;
    }
    // The jobs are the rest of the phase.
    let from = tracker.status().percent.unwrap_or_default();
    let total = record.acts.iter().map(|act| act.action.jobs().len()).sum();
    for index in 0..record.acts.len() {
        let action = record.acts[index].action.clone();
        let jobs = action.jobs();
        if record.acts[index].done < jobs.len() || jobs.is_empty() {
            info!("{}: {}: {}", action.unit, action.class.as_str(), action.reason);
        }
        while let Some(&(verb, unit)) = jobs.get(record.acts[index].done) {
            if let Err(error) = carry_out_one(tracker, manager, &mut record, index, verb, unit).await {
                trouble.push(format!("{error:#}"));
            }
            save(&record)?;
            tracker.share(from, record.acts.iter().map(|act| act.done).sum(), total);
        }
    }
    if let Err(error) = check_dependents(manager, &record.acts, trouble).await {
        trouble.push(format!("cannot check the dependents of restarted units: {error:#}"));
    }
    Ok(record.acts.into_iter().filter(|act| !act.failed).map(|act| act.action).collect())
}

/// Runs one job of systemd, as a span of the timeline.
pub(super) async fn run_job(tracker: &Tracker, manager: &mut Manager, verb: Verb, unit: &str) -> Result<()> {
    let name = format!("{} {unit}", verb.as_str());
    tracker.timed(Subject::Job, name, manager.run(verb, unit, Manager::JOB_TIMEOUT)).await
}

async fn carry_out_one(
    tracker: &Tracker,
    manager: &mut Manager,
    record: &mut UnitsRecord,
    index: usize,
    verb: Verb,
    unit: &str,
) -> Result<()> {
    let mut outcome = Ok(());
    let act = &record.acts[index];
    let run = match verb {
        Verb::TryRestart if act.ending.is_some() => manager.invocation(unit).await.ok().map(hex::encode),
        _ => None,
    };
    if run.is_none() || run == act.ending {
        outcome = run_job(tracker, manager, verb, unit).await;
        if act.action.class == Class::Stop && outcome.is_ok() {
            // Its unit file is gone, so a failed state would stay forever.
            outcome = manager.reset_failed(unit).await;
        }
    }
    record.acts[index].done += 1;
    record.acts[index].failed |= outcome.is_err();
    record.before.remove(unit);
    outcome
}

/// Waits for the dependents that systemd restarted together with a unit, and reports those that failed. The agent does not
/// wait for their jobs otherwise.
async fn check_dependents(manager: &Manager, acts: &[Act], trouble: &mut Vec<String>) -> Result<()> {
    // A target is active only after all units that it wants, which may take longer than the agent runs.
    let dependents = acts.iter().flat_map(|act| &act.action.dependents).map(String::as_str);
    let dependents: BTreeSet<_> = dependents.filter(|name| !name.ends_with(".target")).collect();
    if dependents.is_empty() {
        return Ok(());
    }
    let deadline = Instant::now() + Manager::JOB_TIMEOUT;
    let (pending, failed) = loop {
        let (pending, failed) = manager.pending_and_failed(&dependents).await?;
        if pending.is_empty() || Instant::now() >= deadline {
            break (pending, failed);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let of = |unit: &String| {
        acts.iter().find(|act| act.action.dependents.contains(unit)).map(|act| act.action.unit.as_str())
    };
    for (units, how) in [(&pending, "has not started yet"), (&failed, "has failed")] {
        trouble.extend(units.iter().map(|unit| {
            let because = of(unit).unwrap_or_default();
            format!("{unit} {how}: it was restarted as a dependent of {because}; see systemctl status {unit}")
        }));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::state::survives_every_damage;
    use super::*;
    use unit_refresh::{Definition, How};

    #[test]
    fn the_record_survives_the_file_and_names_stopped_units() {
        let act = |unit: &str, class, done| Act {
            action: Action { how: How::LeftToSocket("s.socket".into()), ..Action::new(unit, class, "r") },
            done,
            failed: false,
            ending: Some("00ff".into()),
        };
        let record = UnitsRecord {
            before: [("a.service".to_owned(), Definition::default())].into(),
            sockets: Some(["s.socket".to_owned()].into()),
            flow: Some(Flow::Live),
            acts: vec![
                act("a.service", Class::Stop, 1),
                act("b.service", Class::Stop, 0),
                act("c.service", Class::Restart, 1),
            ],
        };
        survives_every_damage(&record);
        assert_eq!(record.stopped().collect::<Vec<_>>(), ["a.service"], "a unit that was not stopped is not listed");
        let pulled_in = BTreeSet::from(["new.socket".to_owned(), "s.socket".to_owned()]);
        assert_eq!(record.added_sockets(pulled_in.clone()), ["new.socket".to_owned()].into());
        assert!(UnitsRecord::default().added_sockets(pulled_in).is_empty(), "after the loss of the record");
    }
}
