//! The acts of an undo and of a rollback.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tracing::{info, warn};

use super::obstacles::{self, Below};
use super::switch::{remember_defaults, set_ref};
use crate::agent::new_usr::{ChangedPaths, ETC, USR, USR_SOURCE};
use crate::agent::policy::{Way, policy_step, relabel};
use crate::agent::reexec::reexecute;
use crate::agent::state::{self, if_present};
use crate::agent::unit_jobs::UnitsRecord;
use crate::agent::{StagedRoot, StateDir, unit_survey, views};
use crate::host;
use unit_refresh::{Action, Class, Flow, Manager, Root, Sides, UnitFiles, Verb, Version};

/// The result of an undo.
#[derive(Debug, Default)]
pub(in crate::agent) struct Undone {
    /// Entries kept deliberately, such as files changed since the switch, one line each.
    pub(in crate::agent) kept: Vec<String>,
    /// Failures to restore, one line each. The undo is incomplete if there are any.
    pub(in crate::agent) failed: Vec<String>,
}

/// Plans the undo for the units that run the node image's code. Inspects the running units, because the record of a
/// refresh that failed is incomplete.
///
/// The second list has a line for each fact that could not be determined.
///
/// # Errors
/// systemd or the unit files cannot be read.
pub(in crate::agent) async fn plan_units(
    paths: &StateDir,
    staged: &StagedRoot,
    flow: Flow,
) -> anyhow::Result<(Vec<Action>, Vec<String>)> {
    let (changed, error) = ChangedPaths::or_all(staged);
    let mut troubles = Vec::from_iter(error.map(|error| format!("all files count as changed: {error:#}")));
    let differs = |path: &Path| changed.contains(path);
    let manager = Manager::connect().await?;
    let fragments = unit_refresh::active_fragments(&manager).await?;
    let looked = tokio::task::spawn_blocking(move || removed_units(fragments)).await.context("undo panicked")?;
    let (removed, new, systemd) = looked.context("cannot list the units that only the node image has")?;
    let current = Root::running().unit_files().context("cannot read the unit files")?;
    let old = unit_refresh::definitions(&manager, &current).await?;
    let (version, differs, added) = (Version::Current, &differs, BTreeSet::new());
    let sides = Sides { version, differs, old: &old, new: &new, added: &added, systemd };
    let (states, unseen) = unit_refresh::survey(&manager, &sides).await?;
    troubles.extend(unseen);
    // The units that the switch stopped are started again.
    let record = if_present(staged.load::<UnitsRecord>(paths)).unwrap_or_else(|error| {
        troubles.push(format!("units that the switch stopped stay stopped: {error:#}"));
        None
    });
    let record = record.unwrap_or_default();
    let flow = record.flow.unwrap_or(flow);
    let mut actions = unit_refresh::undo_plan(&states, &removed, flow, &unit_survey::policy());
    actions.extend(record.stopped().map(|unit| Action::new(unit, Class::Start, "the switch stopped it")));
    Ok((actions, troubles))
}

/// Returns the units whose files only the node image has, and the unit files and the release of systemd in the
/// bootimage's `/usr`.
fn removed_units(fragments: Vec<(String, PathBuf)>) -> anyhow::Result<(Vec<String>, UnitFiles, Option<u32>)> {
    overlay_root::Namespace::init().run_without(Path::new(USR), USR_SOURCE, || {
        let gone = |(name, fragment): (String, PathBuf)| (!fragment.exists()).then_some(name);
        let files = Root::running().unit_files().context("cannot read the unit files")?;
        Ok((fragments.into_iter().filter_map(gone).collect(), files, Root::running().systemd_release()))
    })
}

/// Restores `/etc`, the ref, `/usr` and, if there is a plan for `units`, the policy, the caches and the units. Continues
/// after failures and skips completed acts. Begins nothing if there are obstacles.
pub(in crate::agent) async fn undo(paths: &StateDir, staged: &StagedRoot, units: Option<&[Action]>) -> Undone {
    let obstacles = obstacles::obstacles(Below::Unmount);
    if !obstacles.is_empty() {
        return Undone { failed: vec![obstacles::message(&obstacles)], ..Undone::default() };
    }
    let stopped = stop_units(units.unwrap_or_default()).await;
    let (for_files, of, to_guard) = (paths.clone(), staged.clone(), units.is_some());
    let (mut undone, _guard) = match tokio::task::spawn_blocking(move || undo_files(&for_files, &of, to_guard)).await {
        Ok(done) => done,
        Err(error) => (Undone { failed: vec![format!("undo panicked: {error}")], ..Undone::default() }, None),
    };
    undone.kept.extend(stopped);
    // Before PID 1 is re-executed, because it looks labels up in the loaded policy.
    if units.is_some() {
        load_old_policy(paths, staged, &mut undone).await;
        undone.kept.extend(refresh_back(staged).await);
    }
    if let Some(units) = units
        && let Err(error) = undo_units(units, &mut undone.kept).await
    {
        undone.failed.push(format!("systemd: {error:#}"));
    }
    if units.is_some() {
        undone.kept.extend(views::stale(views::Expected::Bootimage));
    }
    // Last, so that a generator that runs before does not arm the pivot again.
    if undone.failed.is_empty()
        && let Err(error) = paths.remove(StateDir::PIVOTED)
    {
        undone.failed.push(format!("{error:#}"));
    }
    for line in undone.kept.iter().chain(&undone.failed) {
        warn!("undo: {line}");
    }
    undone
}

/// Stops the units that only the node image has, while their programs still exist. Returns failures as lines, because a
/// unit that does not stop must not prevent the undo.
async fn stop_units(actions: &[Action]) -> Vec<String> {
    let mut troubles = Vec::new();
    for action in actions.iter().filter(|action| action.class == Class::Stop) {
        info!("undo stops {}: {}", action.unit, action.reason);
        let stopped = async { Manager::connect().await?.stop(&action.unit, Manager::JOB_TIMEOUT).await };
        if let Err(error) = stopped.await {
            troubles.push(format!("{} was not stopped: {error:#}", action.unit));
        }
    }
    troubles
}

/// Re-executes PID 1 from the bootimage's `/usr` and carries out the plan for the units that run the node image's code:
/// sshd's helpers, for example, are the bootimage's again.
async fn undo_units(actions: &[Action], kept: &mut Vec<String>) -> anyhow::Result<()> {
    let mut manager = reexecute(Manager::connect().await?, kept).await?;
    for action in actions {
        match action.class {
            Class::None => {}
            // Again, for units that did not stop before. Their failed state is reset, because no file is left to start
            // them with.
            Class::Stop => {
                if let Err(error) = manager.run(Verb::Stop, &action.unit, Manager::JOB_TIMEOUT).await {
                    kept.push(format!("{} was not stopped: {error:#}", action.unit));
                }
                manager.reset_failed(&action.unit).await?;
            }
            Class::Start => {
                if let Err(error) = manager.run(Verb::Start, &action.unit, Manager::JOB_TIMEOUT).await {
                    kept.push(format!("{error:#}"));
                }
            }
            Class::Restart | Class::Reload => {
                for (verb, unit) in action.jobs() {
                    if let Err(error) = manager.run(verb, unit, Manager::JOB_TIMEOUT).await {
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
async fn refresh_back(staged: &StagedRoot) -> Vec<String> {
    let (changed, error) = ChangedPaths::or_all(staged);
    let mut troubles = Vec::from_iter(error.map(|error| format!("all caches are rebuilt: {error:#}")));
    let differs = |path: &Path| changed.contains(path);
    troubles.extend(host::refresh_back(&differs).await);
    if let Err(error) = host::reload_bus().await {
        troubles.push(format!("{error:#}"));
    }
    troubles
}

/// Restores `/etc`, the ref and `/usr`. The second value re-executes PID 1 if the agent dies. A failure to start it is
/// logged and not fatal, because it is needed only if the agent is killed.
fn undo_files(paths: &StateDir, staged: &StagedRoot, to_guard: bool) -> (Undone, Option<unit_refresh::Guard>) {
    let mut undone = Undone::default();
    state::repair_undo_plan(paths);
    match etc_merge::open_dir(Path::new(ETC)).and_then(|dir| etc_merge::undo(&paths.etc_undo(), dir.as_fd())) {
        Ok(report) => {
            undone.kept.extend(report.kept.iter().map(|entry| format!("/etc/{} stays: {}", entry.path, entry.reason)));
            undone.failed.extend(report.failed.iter().map(|entry| format!("/etc/{}: {}", entry.path, entry.reason)));
            if report.damaged > 0 {
                undone.kept.push(format!(
                    "{} lines of the undo journal of /etc are damaged or missing: the content of these entries is restored, their \
                     labels and times are not; run restorecon on /etc",
                    report.damaged
                ));
            }
            if report.unlabelled > 0 {
                undone.kept.push(format!(
                    "{} entries of /etc could not be given their old security label; run restorecon on /etc",
                    report.unlabelled
                ));
            }
        }
        Err(error) => undone.failed.push(format!("/etc: {error:#}")),
    }
    if undone.failed.is_empty()
        && let Ok(plan) = staged.load::<etc_merge::Plan>(paths)
        && let Err(error) = remember_defaults(paths, staged, &plan.earlier)
    {
        undone.failed.push(format!("{error:#}"));
    }
    if let Err(error) = set_ref(paths, staged, false) {
        undone.failed.push(format!("{error:#}"));
    }
    // Last, because PID 1 may be unable to start services from here until its re-execution.
    let start = || unit_refresh::Guard::start().inspect_err(|error| warn!("{error:#}")).ok();
    let guard = to_guard.then(start).flatten();
    let usr = Path::new(USR);
    let lost =
        overlay_root::Namespace::init().mounts().map(|mounts| overlay_root::mounted_on(&mounts, usr, USR_SOURCE));
    match overlay_root::withdraw(usr, USR_SOURCE) {
        Ok(_) => undone.kept.extend(
            lost.into_iter()
                .flatten()
                .map(|place| format!("{} was unmounted together with the node image's /usr below it", place.display())),
        ),
        Err(error) => undone.failed.push(format!("/usr: {error:#}")),
    }
    (undone, guard)
}

/// Loads the bootimage's policy again after `/etc` and `/usr` are restored.
async fn load_old_policy(paths: &StateDir, staged: &StagedRoot, undone: &mut Undone) {
    match staged.load::<etc_merge::Plan>(paths).map(|plan| policy_step(&plan)) {
        Ok(step) if step.loads() => {
            // Relabel first: the new policy knows nearly all old labels, but the old one few of the new.
            let complete = relabel(paths, staged, Way::Back).await;
            match host::load_policy(step).await {
                Ok(remark) => remark.iter().for_each(|remark| remark.log("undo: ")),
                Err(error) => undone.failed.push(format!("{error:#}")),
            }
            if !complete {
                relabel(paths, staged, Way::Back).await;
            }
        }
        Ok(_) => {}
        Err(error) => undone.kept.push(format!("the loaded SELinux policy was not replaced: {error}")),
    }
}
