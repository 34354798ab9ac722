//! Refresh: the running system adopts the node image's files.

use tracing::info;

use super::live_steps::LiveSteps;
use crate::agent::new_usr::ChangedPaths;
use crate::agent::state::{LiveStep, SwitchStep};
use crate::agent::{Context, Error, Record, Refreshed, Switched, unit_survey, views};
use crate::report::{Phase, State, Subject};
use unit_refresh::{Action, Flow, Guard, Manager};

/// Applies the steps in which the running system adopts the files. Idempotent: after a kill, the next agent runs them
/// again.
pub(super) async fn refresh(
    context: &Context,
    record: &mut Record,
    guard: &mut Option<Guard>,
    Switched { staged }: Switched,
    flow: Flow,
) -> Result<Refreshed, Error> {
    let phase = Phase::Refresh;
    context.tracker.begin(phase);
    let changed = ChangedPaths::of(&staged.delta)?;
    let (trouble, units) = (Vec::new(), Vec::new());
    let mut steps = LiveSteps { context, staged: &staged, changed: &changed, flow, guard, trouble, units };
    for step in LiveStep::ALL {
        record.begin(SwitchStep::Live(step), &context.paths)?;
        context.tracker.timed(Subject::Step, SwitchStep::Live(step).describe(), steps.apply(step)).await?;
    }
    let LiveSteps { mut trouble, units, .. } = steps;
    report_units(context, &Manager::connect().await?, &changed, &units, &mut trouble).await;
    for line in trouble {
        context.tracker.warn(line);
    }
    context.tracker.update(|status| {
        status.cost.ram_store_bytes = overlay_root::tmpfs_used(&context.paths.store()).map_or(0, |usage| usage.used);
    });
    context.tracker.end(phase, State::Switched);
    info!("the running system is the node image's");
    Ok(Refreshed { staged, units })
}

/// Reports the changed units, and those that still run old code, in the status document and the summary.
pub(super) async fn report_units(
    context: &Context,
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
        context.tracker.note(line);
    }
    context.tracker.update(|status| status.still_old = still_old);
}
