//! Refresh: the running system adopts the node image's files.

use tracing::info;

use super::live_steps::LiveSteps;
use crate::agent::new_usr::ChangedPaths;
use crate::agent::state::{LiveStep, SwitchStep};
use crate::agent::unit_jobs::UnitPlan;
use crate::agent::unit_survey::{self, UnitSettings};
use crate::agent::{Error, Record, Refreshed, StateDir, Switched, views};
use crate::report::{Phase, State, Subject, Tracker};
use unit_refresh::{Action, Flow, Guard, Manager};

/// Applies the steps in which the running system adopts the files. Idempotent: after a kill, the next agent runs them
/// again.
pub(super) async fn refresh(
    tracker: &Tracker,
    dir: &StateDir,
    settings: &UnitSettings,
    record: &mut Record,
    guard: &mut Option<Guard>,
    Switched { staged }: Switched,
    flow: Flow,
) -> Result<Refreshed, Error> {
    let phase = Phase::Refresh;
    tracker.begin(phase);
    let changed = ChangedPaths::of(&staged.delta)?;
    let (trouble, units) = (Vec::new(), Vec::new());
    let plan = UnitPlan { tracker, dir, settings, staged: &staged, changed: &changed, flow };
    let mut steps = LiveSteps { plan, guard, trouble, units };
    for (done, step) in LiveStep::ALL.into_iter().enumerate() {
        tracker.share(0, done, LiveStep::ALL.len());
        record.begin(SwitchStep::Live(step), dir)?;
        tracker.timed(Subject::Step, SwitchStep::Live(step).describe(), steps.apply(step)).await?;
    }
    let LiveSteps { mut trouble, units, .. } = steps;
    report_units(tracker, &Manager::connect().await?, &changed, &units, &mut trouble).await;
    tracker.warn_all(trouble);
    tracker.update(|status| {
        status.cost.ram_store_bytes = overlay_root::tmpfs_used(&dir.store()).unwrap_or(0);
    });
    tracker.end(phase, State::Switched);
    info!("the running system is the node image's");
    Ok(Refreshed { staged, units })
}

/// Reports the changed units, and those that still run old code, in the status document and the summary.
pub(super) async fn report_units(
    tracker: &Tracker,
    manager: &Manager,
    changed: &ChangedPaths,
    units: &[Action],
    trouble: &mut Vec<String>,
) {
    let still_old = unit_survey::still_old(manager, changed).await.unwrap_or_else(|error| {
        trouble.push(format!("cannot list the units that still run the bootimage's code: {error:#}"));
        Vec::new()
    });
    for line in unit_survey::notes(units, &still_old).into_iter().chain(views::stale(views::Expected::NodeImage)) {
        tracker.note(line);
    }
    tracker.update(|status| status.still_old = still_old);
}
