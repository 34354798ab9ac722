//! The steps of a switch in which the running system adopts the files in place: the node image's, or the bootimage's again.

use std::path::Path;

use tracing::info;

use super::file_steps::Undone;
use crate::agent::new_usr::ChangedPaths;
use crate::agent::policy::{Way, policy_step, relabel};
use crate::agent::state::LiveStep;
use crate::agent::unit_jobs::{self, UnitPlan, run_job};
use crate::agent::{StateDir, UndoTree, accounts, held_units, policy, reexec, views};
use crate::host;
use crate::report::Tracker;
use overlay_root::delta::Delta;
use unit_refresh::{Action, Class, Flow, Guard, Manager, Verb};

/// The input of the steps, and their results.
pub(super) struct LiveSteps<'a> {
    pub(super) plan: UnitPlan<'a>,
    pub(super) guard: &'a mut Option<Guard>,
    /// A line for each failure that does not prevent the next step.
    pub(super) trouble: Vec<String>,
    /// Actions for units that succeeded.
    pub(super) units: Vec<Action>,
}

impl LiveSteps<'_> {
    /// Applies a step.
    pub(super) async fn apply(&mut self, step: LiveStep) -> anyhow::Result<()> {
        match step {
            LiveStep::Policy => policy::load_policy(self.plan.tracker, self.plan.dir, self.plan.staged).await,
            LiveStep::Manager => self.renew_manager().await,
            LiveStep::Files => {
                self.refresh_files().await;
                Ok(())
            }
            LiveStep::Units => self.refresh_units().await,
        }
    }

    /// Re-executes PID 1. It needs only its libraries.
    async fn renew_manager(&mut self) -> anyhow::Result<()> {
        let changed = self.plan.changed;
        self.trouble.extend(host::refresh_libraries(&|path: &Path| changed.contains(path)).await);
        reexec::guard(self.guard).await;
        reexec::renew_manager(self.plan.tracker, changed).await?;
        *self.guard = None;
        Ok(())
    }

    async fn refresh_files(&mut self) {
        // Before systemd-sysusers, which would allocate other IDs.
        match accounts::add().await {
            Ok((added, left)) => {
                added.line().into_iter().for_each(|line| self.plan.tracker.note(line));
                self.trouble.extend(left);
            }
            Err(error) => {
                self.trouble.push(format!("cannot add the accounts that only the node image has: {error:#}"));
            }
        }
        let changed = self.plan.changed;
        self.trouble.extend(host::refresh(&|path: &Path| changed.contains(path)).await);
        self.trouble.extend(host::reload_bus().await.err().map(|error| format!("{error:#}")));
    }

    async fn refresh_units(&mut self) -> anyhow::Result<()> {
        let &UnitPlan { tracker, changed, flow, .. } = &self.plan;
        let trouble = &mut self.trouble;
        let mut manager = Manager::connect().await?;
        self.units = unit_jobs::carry_out(&self.plan, &mut manager, trouble).await?;
        for unit in host::appliers(&|path: &Path| changed.contains(path), flow == Flow::Live) {
            // A unit without files at boot is inactive, so the restart does not start it.
            let again = async {
                run_job(tracker, &mut manager, Verb::TryRestart, unit).await?;
                run_job(tracker, &mut manager, Verb::Start, unit).await
            };
            trouble.extend(again.await.err().map(|error| format!("{error:#}")));
        }
        Ok(())
    }
}

/// Undoes the steps, with the plan for units that was made before the first one.
pub(super) struct LiveUndo<'a> {
    pub(super) dir: &'a StateDir,
    pub(super) tracker: &'a Tracker,
    pub(super) tree: &'a UndoTree,
    pub(super) units: &'a [Action],
    /// Connection to the re-executed systemd.
    pub(super) manager: Option<Manager>,
}

impl LiveUndo<'_> {
    /// Lets the running system adopt the restored files.
    pub(super) async fn undo(&mut self, step: LiveStep, undone: &mut Undone) {
        match step {
            LiveStep::Policy => load_old_policy(self.dir, self.tree, undone).await,
            LiveStep::Files => undone.kept.extend(refresh_back(&self.tree.delta).await),
            LiveStep::Manager => {
                undone.kept.extend(held_units::release(self.dir).err().map(|error| format!("{error:#}")));
                let renewed = async { reexec::reexecute(Manager::connect().await?, &mut undone.kept).await };
                match renewed.await {
                    Ok(manager) => self.manager = Some(manager),
                    Err(error) => undone.failed.push(format!("systemd: {error:#}")),
                }
            }
            LiveStep::Units => {
                // A PID 1 that could not be re-executed may be unable to start services.
                if let Some(manager) = &mut self.manager
                    && let Err(error) = undo_units(self.tracker, manager, self.units, &mut undone.kept).await
                {
                    undone.failed.push(format!("systemd: {error:#}"));
                }
                undone.kept.extend(views::stale(views::Expected::Bootimage));
            }
        }
    }
}

/// Stops the units that only the node image has, while their programs still exist. Returns failures as lines, because a
/// unit that does not stop must not prevent the undo.
pub(super) async fn stop_units(tracker: &Tracker, actions: &[Action]) -> Vec<String> {
    let mut troubles = Vec::new();
    for action in actions.iter().filter(|action| action.class == Class::Stop) {
        info!("undo stops {}: {}", action.unit, action.reason);
        let stopped = async { run_job(tracker, &mut Manager::connect().await?, Verb::Stop, &action.unit).await };
        if let Err(error) = stopped.await {
            troubles.push(format!("{} was not stopped: {error:#}", action.unit));
        }
    }
    troubles
}

/// Carries out the plan for the units that run the node image's code: sshd's helpers, for example, are the bootimage's
/// again.
async fn undo_units(
    tracker: &Tracker,
    manager: &mut Manager,
    actions: &[Action],
    kept: &mut Vec<String>,
) -> anyhow::Result<()> {
    for action in actions {
        match action.class {
            Class::None | Class::Hold => {}
            // Again, for units that did not stop before. Their failed state is reset, because no file is left to start
            // them with.
            Class::Stop => {
                if let Err(error) = run_job(tracker, manager, Verb::Stop, &action.unit).await {
                    kept.push(format!("{} was not stopped: {error:#}", action.unit));
                }
                manager.reset_failed(&action.unit).await?;
            }
            Class::Start => {
                if let Err(error) = run_job(tracker, manager, Verb::Start, &action.unit).await {
                    kept.push(format!("{error:#}"));
                }
            }
            Class::Restart | Class::Reload => {
                for (verb, unit) in action.jobs() {
                    if let Err(error) = run_job(tracker, manager, verb, unit).await {
                        kept.push(format!("{error:#}"));
                    }
                }
            }
            Class::Never => info!("undo leaves {} alone: {}", action.unit, action.reason),
        }
    }
    Ok(())
}

/// Rebuilds the loader's cache and makes udev and the message bus read the bootimage's files again, before the restart of
/// the units that use them. Returns failures as lines.
async fn refresh_back(delta: &Delta) -> Vec<String> {
    let (changed, error) = ChangedPaths::or_all(delta);
    let mut troubles = Vec::from_iter(error.map(|error| format!("all caches are rebuilt: {error:#}")));
    let differs = |path: &Path| changed.contains(path);
    troubles.extend(host::refresh_back(&differs).await);
    if let Err(error) = host::reload_bus().await {
        troubles.push(format!("{error:#}"));
    }
    troubles
}

/// Loads the bootimage's policy again after `/etc` and `/usr` are restored.
async fn load_old_policy(paths: &StateDir, tree: &UndoTree, undone: &mut Undone) {
    match tree.load::<etc_merge::Plan>(paths).map(|plan| policy_step(&plan)) {
        Ok(step) if step.loads() => {
            // Relabel first: the new policy knows nearly all old labels, but the old one few of the new.
            let complete = relabel(paths, &tree.delta, Way::Back).await;
            match host::load_policy(step).await {
                Ok(remark) => remark.iter().for_each(|remark| remark.log("undo: ")),
                Err(error) => undone.failed.push(format!("{error:#}")),
            }
            if !complete {
                relabel(paths, &tree.delta, Way::Back).await;
            }
        }
        Ok(_) => {}
        Err(error) => undone.kept.push(format!("the loaded SELinux policy was not replaced: {error}")),
    }
}
