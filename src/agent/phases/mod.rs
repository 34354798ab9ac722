//! The phases, and their order.

pub(super) mod complete;
mod file_steps;
mod finish;
mod live_steps;
mod obstacles;
mod pull;
mod refresh;
mod resolve;
mod stage;
mod start;
mod switch;
mod undo;

use anyhow::anyhow;
use tracing::info;

use super::hooks::Hooks;
use super::unit_survey::UnitSettings;
use super::{Call, Error, Goal, Record, Step, unit_jobs};
use crate::report::{RefusalId, State};
use unit_refresh::Flow;

pub(super) use obstacles::{Below, message, obstacles};
pub(super) use resolve::{resolve, wanted};
pub(super) use stage::{check_system, diff_etc};
pub(super) use start::{Start, decide};
pub(super) use undo::{plan_units, undo};

/// The step after the one that stands in the record, or `None` when the goal is reached.
pub(super) async fn next(record: &mut Record, call: &mut Call<'_>) -> Result<Option<Step>, Error> {
    let flow = record.flow();
    let Call { settings, tracker, dir, goal, cancel, staged_now, guard } = call;
    let (tracker, dir, goal, cancel) = (*tracker, *dir, *goal, *cancel);
    let units = UnitSettings::of(settings, tracker);
    let (timeout, target) = (settings.hooks_timeout, &units.target);
    let hooks = |staged| Hooks { tracker, dir, timeout, target, staged, flow, sysroot: None };
    let next = match record.step.clone() {
        Step::Idle => match decide(settings, &|path| path.exists())? {
            Start::NothingToDo(reason) => {
                tracker.update(|status| status.state = State::NothingToDo);
                Step::NothingToDo { reason, isolated: false }
            }
            Start::Go => {
                stage::check_machine(tracker).await?;
                Step::Resolved(resolve(tracker, dir, settings, cancel).await?)
            }
        },
        Step::NothingToDo { reason, isolated: false } if goal == Goal::Finished && flow == Flow::Bootstrap => {
            finish::isolate(dir, &units.target).await?;
            Step::NothingToDo { reason, isolated: true }
        }
        Step::NothingToDo { .. } => return Ok(None),
        Step::Resolved(image) => {
            let target = pull::Target { tracker, dir, registry: &settings.registry, store: settings.store };
            Step::Pulled(pull::pull(&target, image, settings.complete, cancel).await?)
        }
        Step::Pulled(pulled) => {
            let staged = stage::stage(tracker, dir, (&*settings).into(), &units, pulled, flow).await?;
            *staged_now = true;
            Step::Staged(staged)
        }
        Step::Staged(_) if goal < Goal::Switched => return Ok(None),
        // Recorded before the first act, so that an agent started after a kill finishes the switch.
        Step::Staged(staged) => {
            if !*staged_now && !stage::is_current(tracker, dir, &staged).await? {
                info!("/etc or the layers of /usr have changed since they were staged: staging again");
                return Ok(Some(Step::Pulled(staged.pulled)));
            }
            switch::check(dir, &staged)?;
            hooks(&staged).pre_switch(cancel).await?;
            unit_jobs::remember(dir, &units.target, &staged).await?;
            Step::Switching(staged)
        }
        Step::Switching(staged) => Step::Switched(switch::switch(tracker, dir, record, guard, staged).await?),
        Step::Lost { message, .. } => return Err(Error::refused(RefusalId::LostRecord, message)),
        // The caller completes an undo before it asks for the next step.
        Step::Undoing(_) => return Err(anyhow!("undo is not complete").into()),
        Step::Switched(switched) => {
            let refreshed = refresh::refresh(tracker, dir, &units, record, guard, switched, flow).await?;
            hooks(&refreshed.staged).post_switch().await;
            Step::Refreshed(refreshed)
        }
        Step::Refreshed(_) if goal < Goal::Finished => return Ok(None),
        Step::Refreshed(refreshed) => Step::Finished(finish::finish(tracker, dir, &units, refreshed, flow).await?),
        Step::Finished(_) => return Ok(None),
    };
    Ok(Some(next))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use rustix::mount::{MountFlags, mount_bind, mount_remount};

    use super::*;
    use crate::agent::{CancelHandles, StateDir};
    use crate::config::Settings;
    use crate::report::{Status, Tracker};
    use support::testing::private;

    /// The registry does not exist, so a request to it would be retried forever.
    #[test]
    fn the_machine_is_checked_before_the_registry_is_asked() {
        private(|scratch| {
            mount_bind("/etc", "/etc").unwrap();
            mount_remount("/etc", MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
            let line = "node-image-pivot=force node-image-pivot.image=127.0.0.1:1/none:1";
            let settings = Settings::load_from(Path::new("/nonexistent"), line).unwrap();
            let (tracker, dir) = (&Tracker::new(Status::default()), &StateDir::below(scratch));
            let (mut record, cancel) = (Record::default(), CancelHandles::default().register("test"));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (goal, cancel) = (Goal::Staged, &cancel);
            let mut call = Call { settings, tracker, dir, goal, cancel, staged_now: false, guard: None };
            let refused = runtime.block_on(next(&mut record, &mut call)).unwrap_err();
            let reasons = refused.last_error().refusals;
            assert!(reasons.iter().any(|reason| reason.id == "etc-read-only"), "{refused}");
        });
    }
}
