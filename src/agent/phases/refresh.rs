//! Refresh: the running system adopts the node image's files.

use std::path::Path;

use tracing::info;

use crate::agent::new_usr::ChangedPaths;
use crate::agent::{Context, Error, Switched, accounts, policy, reexec, unit_jobs, unit_survey, views};
use crate::host;
use crate::report::{Phase, State};
use unit_refresh::{Flow, Manager, Verb};

/// Refreshes the policy, PID 1, accounts, files, caches, the message bus and the units that run old code. Idempotent: after
/// a kill, the next agent runs it again.
pub(super) async fn refresh(context: &Context, mut switched: Switched, flow: Flow) -> Result<Switched, Error> {
    let phase = Phase::Refresh;
    context.tracker.begin(phase);
    let changed = ChangedPaths::of(&switched.staged)?;
    let differs = |path: &Path| changed.contains(path);

    // First, because confined programs cannot use the new files until the kernel knows their labels.
    policy::load_policy(context, &switched.staged).await?;
    // Then PID 1, which may be unable to start services until it is re-executed from this /usr. It needs only its
    // libraries.
    let mut trouble = host::refresh_libraries(&differs).await;
    context.guard().await;
    let mut manager = reexec::renew_manager(context, &changed).await?;
    context.unguard().await;
    // Before systemd-sysusers, which would allocate other IDs.
    match accounts::add().await {
        Ok((added, left)) => {
            added.line().into_iter().for_each(|line| context.tracker.note(line));
            trouble.extend(left);
        }
        Err(error) => trouble.push(format!("cannot add the accounts that only the node image has: {error:#}")),
    }
    trouble.extend(host::refresh(&differs).await);
    if let Err(error) = host::reload_bus().await {
        trouble.push(format!("{error:#}"));
    }
    switched.units =
        unit_jobs::carry_out(context, &mut manager, &switched.staged, &changed, flow, &mut trouble).await?;
    for unit in host::appliers(&differs, flow == Flow::Live) {
        // A unit without files at boot is inactive, so the restart does not start it.
        let again = async {
            manager.run(Verb::TryRestart, unit, Manager::JOB_TIMEOUT).await?;
            manager.run(Verb::Start, unit, Manager::JOB_TIMEOUT).await
        };
        if let Err(error) = again.await {
            trouble.push(format!("{error:#}"));
        }
    }

    report_units(context, &manager, &changed, &switched, &mut trouble).await;
    for line in trouble {
        context.tracker.warn(line);
    }
    context.tracker.update(|status| {
        status.cost.ram_store_bytes = overlay_root::tmpfs_used(&context.paths.store()).map_or(0, |usage| usage.used);
    });
    context.tracker.end(phase, State::Switched);
    info!("the running system is the node image's");
    Ok(switched)
}

/// Reports the changed units, and those that still run old code, in the status document and the summary.
pub(super) async fn report_units(
    context: &Context,
    manager: &Manager,
    changed: &ChangedPaths,
    switched: &Switched,
    trouble: &mut Vec<String>,
) {
    let still_old = unit_survey::still_old(manager, changed).await.unwrap_or_else(|error| {
        trouble.push(format!("cannot list the units that still run the bootimage's code: {error:#}"));
        Vec::new()
    });
    for line in
        unit_survey::notes(&switched.units, &still_old).into_iter().chain(views::stale(views::Expected::NodeImage))
    {
        context.tracker.note(line);
    }
    context.tracker.update(|status| status.still_old = still_old);
}
