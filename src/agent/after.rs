//! Refresh and finish: what runs becomes the node image's, then the machine goes where it was going.

use std::path::Path;

use anyhow::Context as _;
use tracing::{info, warn};

use super::new_usr::ChangedPaths;
use super::{Context, Error, Paths, Switched, accounts, reexec, switch, units, views};
use crate::host;
use crate::report::{Phase, State};
use support::directory::Directory;
use unit_refresh::{Flow, Manager, Verb};

/// Users, files, caches, PID 1, the bus and the units that run old code. Idempotent: a daemon that
/// was killed in here does it again.
pub(super) async fn refresh(context: &Context, mut switched: Switched, flow: Flow) -> Result<Switched, Error> {
    let phase = Phase::Refresh;
    context.tracker.begin(phase);
    let changed = ChangedPaths::of(&switched.staged)?;
    let differs = |path: &Path| changed.contains(path);

    // First: until the kernel knows the labels of the new files, confined programs cannot use them.
    switch::load_policy(context, &switched.staged).await?;
    // Then PID 1, which may be unable to start anything until it is the one of this /usr, and needs nothing but
    // its libraries.
    let mut trouble = host::refresh_libraries(&differs).await;
    context.guard().await;
    let mut manager = reexec::renew_manager(context, &changed).await?;
    context.unguard().await;
    // Before systemd-sysusers, which would give them other ids.
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
    switched.units = units::carry_out(context, &mut manager, &changed, flow, &mut trouble).await?;
    for unit in host::appliers(&differs, flow == Flow::Live) {
        // What had no files at boot is not active.
        let again = async {
            manager.run(Verb::TryRestart, unit, Manager::JOB_TIMEOUT).await?;
            manager.run(Verb::Start, unit, Manager::JOB_TIMEOUT).await
        };
        if let Err(error) = again.await {
            trouble.push(format!("{error:#}"));
        }
    }

    tell_units(context, &manager, &changed, &switched, &mut trouble).await;
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

/// Says in the status document and the summary what happened to units, and what still runs old code.
async fn tell_units(
    context: &Context,
    manager: &Manager,
    changed: &ChangedPaths,
    switched: &Switched,
    trouble: &mut Vec<String>,
) {
    let still_old = units::still_old(manager, changed).await.unwrap_or_else(|error| {
        trouble.push(format!("cannot tell what still runs the bootimage's code: {error:#}"));
        Vec::new()
    });
    for line in units::notes(&switched.units, &still_old).into_iter().chain(views::stale(views::Expected::NodeImage)) {
        context.tracker.note(line);
    }
    context.tracker.update(|status| status.still_old = still_old);
}

/// Isolates to the target that the machine would have booted to. On a live system that is more than was asked for
/// until now: units may be restarted, and what the target pulls in of the node image expects that of others (networkd's
/// helpers, for one, that networkd is their own).
pub(super) async fn finish(context: &Context, mut switched: Switched, flow: Flow) -> Result<Switched, Error> {
    context.tracker.begin(Phase::Finish);
    if flow == Flow::Live {
        let changed = ChangedPaths::of(&switched.staged)?;
        let mut manager = Manager::connect().await?;
        let mut trouble = Vec::new();
        switched.units = units::carry_out(context, &mut manager, &changed, Flow::Bootstrap, &mut trouble)
            .await
            .context("nothing was isolated, everything before that is done; start node-image-finish.service again")?;
        tell_units(context, &manager, &changed, &switched, &mut trouble).await;
        for line in trouble {
            context.tracker.warn(line);
        }
    }
    isolate(context).await?;
    context.tracker.end(Phase::Finish, State::Done);
    Ok(switched)
}

/// Queues the isolation and returns: waiting for it would be waiting for our own caller, which is
/// part of what is rearranged.
pub(super) async fn isolate(context: &Context) -> Result<(), Error> {
    let target = units::target(context);
    let not =
        || format!("{target} was not isolated, everything before that is done; start node-image-finish.service again");
    let manager = Manager::connect().await.with_context(not)?;
    // An administrator who went there in the meantime is fixing something, and must not be interrupted.
    for refuge in ["rescue.target", "emergency.target"].into_iter().filter(|refuge| *refuge != target) {
        if manager.is_active_or_queued(refuge).await.with_context(not)? {
            return Err(anyhow::anyhow!(
                "the machine is in {refuge}: {target} was not isolated, everything before that is done; \
                 leave it (systemctl default), then start node-image-finish.service"
            )
            .into());
        }
    }
    if manager.isolate_or_start(&target).await.with_context(not)? {
        info!(target, "isolating");
    } else {
        // As systemd itself does with such a default target at boot.
        warn!("{target} cannot be isolated, it has no AllowIsolate=yes: started instead, what runs goes on running");
    }
    // The boot is over: should the switch be undone, a reload must not send `systemctl default` to the pivot.
    if let Err(error) = Directory::ensure(context.paths.run()).and_then(|run| run.remove_all(Paths::REDIRECTED)) {
        warn!("cannot remove {}: {error}", context.paths.run().join(Paths::REDIRECTED).display());
    }
    Ok(())
}
