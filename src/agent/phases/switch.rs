//! Switch: applies the steps that change files and mounts.
//!
//! The record says `switching` before the first step, and lists each step before it begins, so an agent that is started
//! after a kill finds it. If a step fails, the agent rolls back the earlier ones.

use std::path::Path;

use anyhow::Context as _;
use tracing::info;

use super::file_steps::FileSteps;
use crate::agent::new_usr::ETC;
use crate::agent::state::{FileStep, SwitchStep};
use crate::agent::{Error, Record, StagedRoot, StateDir, SwitchPlan, Switched, reexec};
use crate::report::{Phase, RefusalId, State, Subject, Tracker};
use unit_refresh::Guard;

/// Exposes the new `/usr` and merges `/etc`.
pub(super) async fn switch(
    tracker: &Tracker,
    dir: &StateDir,
    record: &mut Record,
    guard: &mut Option<Guard>,
    staged: StagedRoot,
) -> Result<Switched, Error> {
    let phase = Phase::Switch;
    tracker.begin(phase);
    // Before the first act, also after a kill.
    staged.load::<etc_merge::Plan>(dir)?;
    // Until the refresh has re-executed PID 1.
    reexec::guard(guard).await;
    let (commit, tree) = (staged.pulled.commit, staged.clone().into());
    let steps = FileSteps { dir: dir.clone(), tree };
    for (done, step) in FileStep::ALL.into_iter().enumerate() {
        tracker.share(0, done, FileStep::ALL.len());
        record.begin(SwitchStep::File(step), dir)?;
        let steps = steps.clone();
        let apply = async {
            tokio::task::spawn_blocking(move || steps.apply(step, commit))
                .await
                .context("the switch panicked")
                .flatten()
        };
        let subject = if step == FileStep::Usr { Subject::Mount } else { Subject::Step };
        let applied = tracker.timed(subject, SwitchStep::File(step).describe(), apply).await?;
        if let Some(report) = applied {
            for line in report.to_string().lines() {
                info!("{line}");
            }
            for skipped in &report.skipped {
                tracker.note(format!("left alone: /etc/{}: {}", skipped.path, skipped.reason));
            }
        }
    }
    // Not yet in the state `switched`: until the refresh, running programs are the bootimage's.
    tracker.end(phase, State::Running);
    Ok(Switched { staged })
}

/// Checks the plans, and the disk space for the files of the merge. Changes nothing.
///
/// # Errors
/// A refusal with the missing bytes, or with the plan that cannot be used.
pub(super) fn check(paths: &StateDir, staged: &StagedRoot) -> Result<(), Error> {
    let plan = staged.load::<etc_merge::Plan>(paths)?;
    staged.load::<SwitchPlan>(paths)?;
    let refusals = etc_merge::check_room(&plan, Path::new(ETC), paths.run())?;
    if refusals.is_empty() {
        return Ok(());
    }
    Err(Error::refused(RefusalId::TooLittle, refusals.join("; ")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::agent::state::{StateFile, staged};

    #[test]
    fn a_plan_that_is_not_the_records_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir::below(temp.path());
        let mut staged = staged();
        let plan = etc_merge::Plan::default();
        let checksum = staged.save(&plan, &dir).unwrap();
        staged.plans.insert(etc_merge::Plan::NAME.to_owned(), checksum);
        assert!(staged.load::<etc_merge::Plan>(&dir).is_ok());
        let decision = r#"{"path": "x", "class": "conflict", "reason": "r"}"#;
        let other = etc_merge::Plan { decisions: vec![serde_json::from_str(decision).unwrap()], ..plan };
        staged.save(&other, &dir).unwrap();
        let refused = check(&dir, &staged).unwrap_err();
        let entry = refused.last_error();
        assert_eq!(entry.refusals[0].id, "state-file");
        assert!(entry.message.contains("etc-plan.json: it does not match the record"), "{refused}");
    }
}
