//! Finish: isolates to the target that the machine was booting to.

use anyhow::Context as _;
use tracing::{info, warn};

use super::refresh::report_units;
use crate::agent::new_usr::ChangedPaths;
use crate::agent::{Context, Error, Finished, Refreshed, StateDir, unit_jobs, unit_survey};
use crate::report::{Phase, State};
use unit_refresh::{Flow, Manager};

/// Isolates to the target that the machine would have booted to. On a live system, first carries out the unit plan of the
/// bootstrap flow, because units of the node image that the target starts expect new versions of others: networkd's
/// helpers, for example, expect the networkd of their release.
pub(super) async fn finish(context: &Context, mut refreshed: Refreshed, flow: Flow) -> Result<Finished, Error> {
    context.tracker.begin(Phase::Finish);
    if flow == Flow::Live {
        let changed = ChangedPaths::of(&refreshed.staged.delta)?;
        let mut manager = Manager::connect().await?;
        let mut trouble = Vec::new();
        let staged = &refreshed.staged;
        let acts = unit_jobs::carry_out(context, &mut manager, staged, &changed, Flow::Bootstrap, &mut trouble);
        refreshed.units = acts
            .await
            .context("nothing was isolated, everything before that is done; start node-image-finish.service again")?;
        report_units(context, &manager, &changed, &refreshed.units, &mut trouble).await;
        for line in trouble {
            context.tracker.warn(line);
        }
    }
    isolate(context).await?;
    context.tracker.end(Phase::Finish, State::Done);
    Ok(Finished(refreshed))
}

/// Queues the isolation and returns. Waiting would block forever, because the isolation stops the agent's caller.
pub(super) async fn isolate(context: &Context) -> Result<(), Error> {
    let target = unit_survey::target(context);
    let not =
        || format!("{target} was not isolated, everything before that is done; start node-image-finish.service again");
    let manager = Manager::connect().await.with_context(not)?;
    // An administrator who entered one of these targets is repairing the machine and must not be interrupted.
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
        // systemd starts such a default target at boot in the same way.
        warn!("{target} cannot be isolated, it has no AllowIsolate=yes: started instead, and running units continue");
    }
    // The boot has ended. After an undo, a reload must not redirect `systemctl default` to the pivot.
    if let Err(error) = context.paths.remove(StateDir::REDIRECTED) {
        warn!("{error:#}");
    }
    Ok(())
}
