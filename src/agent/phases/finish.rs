//! Finish: isolates to the target that the machine was booting to.

use anyhow::Context as _;
use tracing::{info, warn};

use super::refresh::report_units;
use crate::agent::new_usr::ChangedPaths;
use crate::agent::unit_jobs::{self, UnitPlan};
use crate::agent::unit_survey::UnitSettings;
use crate::agent::{Error, Finished, Refreshed, StateDir, held_units};
use crate::report::{Phase, State, Tracker};
use unit_refresh::{Flow, Manager};

/// Isolates to the target that the machine would have booted to. On a live system, first carries out the unit plan of the
/// bootstrap flow, because units of the node image that the target starts expect new versions of others: networkd's
/// helpers, for example, expect the networkd of their release.
pub(super) async fn finish(
    tracker: &Tracker,
    dir: &StateDir,
    settings: &UnitSettings,
    mut refreshed: Refreshed,
    flow: Flow,
) -> Result<Finished, Error> {
    tracker.begin(Phase::Finish);
    if flow == Flow::Live {
        let changed = ChangedPaths::of(&refreshed.staged.delta)?;
        let mut manager = Manager::connect().await?;
        let mut trouble = Vec::new();
        let (staged, changed) = (&refreshed.staged, &changed);
        let plan = UnitPlan { tracker, dir, settings, staged, changed, flow: Flow::Bootstrap };
        refreshed.units = unit_jobs::carry_out(&plan, &mut manager, &mut trouble)
            .await
            .context("nothing was isolated, everything before that is done; start node-image-finish.service again")?;
        report_units(tracker, &manager, changed, &refreshed.units, &mut trouble).await;
        tracker.warn_all(trouble);
    }
    held_units::hold_back(tracker, dir, settings).await.with_context(|| {
        let target = &settings.target;
        format!("{target} was not isolated, everything before that is done; start node-image-finish.service again")
    })?;
    isolate(dir, &settings.target).await?;
    tracker.end(Phase::Finish, State::Done);
    Ok(Finished(refreshed))
}

/// Queues the isolation and returns. Waiting would block forever, because the isolation stops the agent's caller.
pub(super) async fn isolate(dir: &StateDir, target: &str) -> Result<(), Error> {
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
    if manager.isolate_or_start(target).await.with_context(not)? {
        info!(target, "isolating");
    } else {
        // systemd starts such a default target at boot in the same way.
        warn!("{target} cannot be isolated, it has no AllowIsolate=yes: started instead, and running units continue");
    }
    // The boot has ended. After an undo, a reload must not redirect `systemctl default` to the pivot.
    if let Err(error) = dir.remove(StateDir::REDIRECTED) {
        warn!("{error:#}");
    }
    Ok(())
}
