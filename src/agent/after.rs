//! Refresh and finish: what runs becomes the node image's, then the machine goes where it was going.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tracing::{info, warn};

use super::{Context, Error, Switched, switch};
use crate::host;
use crate::mount;
use crate::report::{Phase, State};
use crate::units::{self, Class, Flow, Manager, Version};

/// How long one unit may take to restart before we go on without it.
pub(super) const RESTART: Duration = Duration::from_secs(90);
/// Users, files, caches, PID 1, the bus and the units that run old code. Idempotent: a daemon that
/// was killed in here does it again.
pub(super) async fn refresh(context: &Context, mut switched: Switched, flow: Flow) -> Result<Switched, Error> {
    let phase = Phase::Refresh;
    context.tracker.begin(phase);
    // The delta tree holds just what differs, so looking a path up in it is the comparison. What
    // cannot be looked up is taken for changed: a needless restart is the smaller mistake.
    let delta = switched.staged.delta.lookup()?;
    let differs = |path: &Path| delta.contains(path).unwrap_or(true);

    // First of all: until the kernel knows the labels of what was written, nobody may use it.
    switch::load_policy(context).await?;
    let mut trouble = host::refresh(&differs).await;

    let mut manager = Manager::connect().await?;
    let (running, unseen) = units::survey(&manager, Version::Replaced, &differs).await?;
    trouble.extend(unseen);
    if units::mapped_files(1).iter().any(|path| differs(Path::new(path))) {
        manager = manager.reexecute().await?;
        context.tracker.note("systemd was re-executed: its binary or libraries changed");
    } else {
        manager.reload().await?;
    }
    if let Err(error) = host::reload_bus().await {
        trouble.push(format!("{error:#}"));
    }

    switched.units = units::plan(&running, flow);
    for action in &switched.units {
        info!("{}: {}: {}", action.unit, action.class.as_str(), action.reason);
        if action.class == Class::Restart
            && let Err(error) = manager.try_restart(&action.unit, RESTART).await
        {
            trouble.push(format!("{error:#}"));
        }
    }
    for unit in host::appliers(&differs, flow == Flow::Live) {
        // What had no files at boot is not active.
        let again = async {
            manager.try_restart(unit, RESTART).await?;
            manager.start(unit, RESTART).await
        };
        if let Err(error) = again.await {
            trouble.push(format!("{error:#}"));
        }
    }

    let of =
        |class| switched.units.iter().filter(move |action| action.class == class).map(|action| action.unit.as_str());
    let restarted: Vec<_> = of(Class::Restart).collect();
    if !restarted.is_empty() {
        context.tracker.note(format!("restarted: {}", restarted.join(" ")));
    }
    let old: Vec<_> = of(Class::Never).collect();
    if !old.is_empty() {
        context.tracker.note(format!("still runs the bootimage's code: {}", old.join(" ")));
    }
    for line in trouble {
        warn!("{line}");
        context.tracker.note(format!("warning: {line}"));
    }
    context.tracker.update(|status| {
        status.cost.ram_store_bytes = mount::tmpfs_used(&context.paths.store()).map_or(0, |usage| usage.used);
    });
    context.tracker.end(phase, State::Switched);
    info!("the running system is the node image's");
    Ok(switched)
}

/// Isolates to the target that the machine would have booted to.
pub(super) async fn finish(context: &Context, switched: Switched) -> Result<Switched, Error> {
    context.tracker.begin(Phase::Finish);
    isolate(context).await?;
    context.tracker.end(Phase::Finish, State::Done);
    Ok(switched)
}

/// Queues the isolation and returns: waiting for it would be waiting for our own caller, which is
/// part of what is rearranged.
pub(super) async fn isolate(context: &Context) -> Result<(), Error> {
    // The record's target: what the daemon that saw the generator's drop-in was told.
    let target = context.tracker.status().target.unwrap_or_else(|| context.settings.target.clone());
    let manager = Manager::connect().await?;
    manager.isolate(&target).await.with_context(|| {
        format!("{target} was not isolated, everything before that is done; start node-image-finish.service again")
    })?;
    info!(target, "isolating");
    Ok(())
}
