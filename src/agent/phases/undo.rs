//! The acts of an undo and of a rollback.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tracing::{info, warn};

use super::obstacles::{self, Below};
use super::switch::{remember_defaults, set_ref};
use crate::agent::new_usr::{ChangedPaths, ETC, USR, USR_SOURCE};
use crate::agent::policy::{Way, label_anew, policy_step};
use crate::agent::reexec::reexecute;
use crate::agent::unit_jobs::UnitsRecord;
use crate::agent::{Paths, StagedRoot, state, unit_survey, views};
use crate::host;
use support::directory::Directory;
use unit_refresh::{Action, Class, Flow, Manager, Root, Sides, UnitFiles, Verb, Version};

/// How an undo went.
#[derive(Debug, Default)]
pub(in crate::agent) struct Undone {
    /// What stays on purpose, such as files that somebody changed since.
    pub(in crate::agent) kept: Vec<String>,
    /// What could not be put back.
    pub(in crate::agent) failed: Vec<String>,
}

/// What runs the node image's code, and what to do about it. It is looked at, not taken from what the
/// switch recorded: a refresh that failed half-way has no complete record.
///
/// The second list names what could not be found out, a line each.
pub(in crate::agent) async fn plan_units(
    paths: &Paths,
    staged: &StagedRoot,
    flow: Flow,
) -> anyhow::Result<(Vec<Action>, Vec<String>)> {
    let (changed, error) = ChangedPaths::or_all(staged);
    let mut troubles = Vec::from_iter(error.map(|error| format!("all files count as changed: {error:#}")));
    let differs = |path: &Path| changed.contains(path);
    let manager = Manager::connect().await?;
    let fragments = unit_refresh::active_fragments(&manager).await?;
    let looked = tokio::task::spawn_blocking(move || leaving(fragments)).await.context("undo panicked")?;
    let (leaving, new, systemd) = looked.context("cannot tell which units only the node image has")?;
    let current = Root::running().unit_files().context("cannot read the unit files")?;
    let old = unit_refresh::definitions(&manager, &current).await?;
    let (version, differs, added) = (Version::Current, &differs, BTreeSet::new());
    let sides = Sides { version, differs, old: &old, new: &new, added: &added, systemd };
    let (states, unseen) = unit_refresh::survey(&manager, &sides).await?;
    troubles.extend(unseen);
    // What was stopped and restarted there is, on the way back, too.
    let record = UnitsRecord::load(paths).unwrap_or_else(|error| {
        troubles.push(format!("units that the switch stopped stay stopped: {error:#}"));
        None
    });
    let record = record.unwrap_or_default();
    let flow = record.flow.unwrap_or(flow);
    let mut actions = unit_refresh::undo_plan(&states, &leaving, flow, &unit_survey::policy());
    actions.extend(record.stopped().map(|unit| Action::new(unit, Class::Start, "the switch stopped it")));
    Ok((actions, troubles))
}

/// The units whose files are not there without the node image's `/usr`, all unit files that are, and the release of the
/// systemd that is.
fn leaving(fragments: Vec<(String, PathBuf)>) -> anyhow::Result<(Vec<String>, UnitFiles, Option<u32>)> {
    overlay_root::Namespace::init().run_without(Path::new(USR), USR_SOURCE, || {
        let gone = |(name, fragment): (String, PathBuf)| (!fragment.exists()).then_some(name);
        let files = Root::running().unit_files().context("cannot read the unit files")?;
        Ok((fragments.into_iter().filter_map(gone).collect(), files, Root::running().systemd_release()))
    })
}

/// Puts `/etc`, `/usr`, the ref and, where units saw the switch, those back. Everything is tried, whatever
/// fails; what is done already is not done again.
///
/// Nothing is begun where something already known would keep it from its end.
pub(in crate::agent) async fn undo(paths: &Paths, staged: &StagedRoot, units: Option<&[Action]>) -> Undone {
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
    // Before PID 1 is the old one again: it looks labels up in what is loaded.
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
    // Last: a generator that runs before must not arm the pivot again.
    if undone.failed.is_empty()
        && let Err(error) = Directory::ensure(paths.run()).and_then(|run| run.remove_all(Paths::PIVOTED))
    {
        undone.failed.push(format!("{}: {error}", paths.pivoted().display()));
    }
    for line in undone.kept.iter().chain(&undone.failed) {
        warn!("undo: {line}");
    }
    undone
}

/// Stops what only the node image has, as long as its own programs can do it. Returns what went wrong: a unit
/// that does not stop is no reason to stay half-way.
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

/// PID 1 must be the old program again, with the old unit files, and so must be what ran the node
/// image's code: sshd's helpers, for one, are the old ones again.
async fn undo_units(actions: &[Action], kept: &mut Vec<String>) -> anyhow::Result<()> {
    let mut manager = reexecute(Manager::connect().await?, kept).await?;
    for action in actions {
        match action.class {
            Class::None => {}
            // Once more, for what could not be stopped before. How it ended concerns nobody any more, and nobody
            // could start it to make that good.
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

/// Makes what the refresh made of the node image's files of the old ones again: the loader's cache, and what udev and the
/// message bus have read. Before units are restarted, which look there. Returns what went wrong: no reason to stop.
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

/// The second value watches over us until PID 1 is the old one again. Without one we go on: it is needed
/// only if we are killed.
fn undo_files(paths: &Paths, staged: &StagedRoot, to_guard: bool) -> (Undone, Option<unit_refresh::Guard>) {
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
        && let Ok(plan) = state::load_etc_plan(paths)
        && let Err(error) = remember_defaults(paths, staged, &plan.earlier)
    {
        undone.failed.push(format!("{error:#}"));
    }
    if let Err(error) = set_ref(paths, staged, false) {
        undone.failed.push(format!("{error:#}"));
    }
    // Last: between this and its re-execution PID 1 may be unable to start anything.
    let start = || unit_refresh::Guard::start().inspect_err(|error| warn!("{error:#}")).ok();
    let guard = to_guard.then(start).flatten();
    let usr = Path::new(USR);
    let lost =
        overlay_root::Namespace::init().mounts().map(|mounts| overlay_root::mounted_on(&mounts, usr, USR_SOURCE));
    match overlay_root::withdraw(usr, USR_SOURCE) {
        Ok(_) => undone.kept.extend(lost.into_iter().flatten().map(|place| {
            format!("{} was unmounted with the node image's /usr, on which it had been mounted since", place.display())
        })),
        Err(error) => undone.failed.push(format!("/usr: {error:#}")),
    }
    (undone, guard)
}

/// The old policy again, when `/etc` and `/usr` are the old ones again.
async fn load_old_policy(paths: &Paths, staged: &StagedRoot, undone: &mut Undone) {
    match state::load_etc_plan(paths).map(|plan| policy_step(&plan)) {
        Ok(step) if step.loads() => {
            // Before: the new policy knows nearly all old labels, the old one hardly any that are new.
            let complete = label_anew(paths, staged, Way::Back).await;
            match host::load_policy(step).await {
                Ok(remark) => remark.iter().for_each(|remark| remark.log("undo: ")),
                Err(error) => undone.failed.push(format!("{error:#}")),
            }
            if !complete {
                label_anew(paths, staged, Way::Back).await;
            }
        }
        Ok(_) => {}
        Err(error) => undone.kept.push(format!("the SELinux policy stays as it is loaded: {error:#}")),
    }
}
