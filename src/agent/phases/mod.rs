//! The phases, and their order.

mod complete;
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

use super::{Call, Context, Error, Goal, Record, Step, hooks, unit_jobs};
use crate::report::{RefusalId, State};
use start::{Start, decide};
use unit_refresh::Flow;

pub(super) use obstacles::{Below, message, obstacles};
pub(super) use resolve::resolve;
pub(super) use stage::diff_etc;
pub(super) use undo::{plan_units, undo};

/// The step after the one that stands in the record, or `None` when the goal is reached.
pub(super) async fn next(context: &Context, record: &mut Record, call: &mut Call<'_>) -> Result<Option<Step>, Error> {
    let (flow, goal, cancel) = (record.flow(), call.goal, call.cancel);
    let next = match record.step.clone() {
        Step::Idle => match decide(&context.settings, &|path| path.exists()) {
            Start::Refuse => {
                return Err(Error::refused(
                    RefusalId::ModeOff,
                    "the mode is \"off\": node-image-pivot= on the kernel command line, or `mode` in a drop-in file",
                ));
            }
            Start::NothingToDo(reason) => {
                context.tracker.update(|status| status.state = State::NothingToDo);
                Step::NothingToDo { reason, isolated: false }
            }
            Start::Go => {
                stage::check_machine().await?;
                Step::Resolved(resolve(context, cancel).await?)
            }
        },
        Step::NothingToDo { reason, isolated: false } if goal == Goal::Finished && flow == Flow::Bootstrap => {
            finish::isolate(context).await?;
            Step::NothingToDo { reason, isolated: true }
        }
        Step::NothingToDo { .. } => return Ok(None),
        Step::Resolved(image) => Step::Pulled(pull::pull(context, image, cancel).await?),
        Step::Pulled(pulled) => {
            let staged = stage::stage(context, pulled, flow).await?;
            call.staged_now = true;
            Step::Staged(staged)
        }
        Step::Staged(_) if goal < Goal::Switched => return Ok(None),
        // Recorded before the first act, so that an agent started after a kill finishes the switch.
        Step::Staged(staged) => {
            if !call.staged_now && !stage::is_current(context, &staged).await? {
                info!("/etc has changed since it was staged: staging again");
                return Ok(Some(Step::Pulled(staged.pulled)));
            }
            switch::check(&context.paths, &staged)?;
            hooks::pre_switch(context, &staged, flow, cancel).await?;
            unit_jobs::remember(context, &staged).await?;
            Step::Switching(staged)
        }
        Step::Switching(staged) => Step::Switched(switch::switch(context, record, &mut call.guard, staged).await?),
        Step::Lost { message, .. } => return Err(Error::refused(RefusalId::LostRecord, message)),
        // The caller completes an undo before it asks for the next step.
        Step::Undoing(_) => return Err(anyhow!("undo is not complete").into()),
        Step::Switched(switched) => {
            let refreshed = refresh::refresh(context, record, &mut call.guard, switched, flow).await?;
            hooks::post_switch(context, &refreshed.staged, flow).await;
            Step::Refreshed(refreshed)
        }
        Step::Refreshed(_) if goal < Goal::Finished => return Ok(None),
        Step::Refreshed(refreshed) => Step::Finished(finish::finish(context, refreshed, flow).await?),
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
            let context = Context::new(settings, Tracker::new(Status::default()), StateDir::below(scratch));
            let (mut record, cancel) = (Record::default(), CancelHandles::default().register("test"));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut call = Call { goal: Goal::Staged, cancel: &cancel, staged_now: false, guard: None };
            let refused = runtime.block_on(next(&context, &mut record, &mut call)).unwrap_err();
            let reasons = refused.last_error().refusals;
            assert!(reasons.iter().any(|reason| reason.id == "etc-read-only"), "{refused}");
        });
    }
}
