//! Undo and rollback: walk the steps of the switch back.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tracing::warn;

use super::file_steps::{FileSteps, Undone};
use super::live_steps::{LiveUndo, stop_units};
use super::obstacles::{self, Below};
use crate::agent::new_usr::{ChangedPaths, USR, USR_SOURCE};
use crate::agent::reexec::guard;
use crate::agent::state::{FileStep, SwitchStep, if_present};
use crate::agent::unit_jobs::UnitsRecord;
use crate::agent::{Record, StateDir, UndoTree, unit_survey};
use crate::report::{Subject, Tracker};
use unit_refresh::{Action, Class, Flow, Manager, Root, Sides, UnitFiles, Version};

/// Plans the undo for the units that run the node image's code. Inspects the running units, because the record of a
/// refresh that failed is incomplete.
///
/// The second list has a line for each fact that could not be determined.
///
/// # Errors
/// systemd or the unit files cannot be read.
pub(in crate::agent) async fn plan_units(
    paths: &StateDir,
    tree: &UndoTree,
    flow: Flow,
) -> anyhow::Result<(Vec<Action>, Vec<String>)> {
    let (changed, error) = ChangedPaths::or_all(&tree.delta);
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
    let record = if_present(tree.load::<UnitsRecord>(paths)).unwrap_or_else(|error| {
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

/// Undoes the steps that changed files and, if there is a plan for `units`, those of the refresh. Continues after failures;
/// a step that was not applied is not changed. Begins nothing if there are obstacles.
pub(in crate::agent) async fn undo(
    paths: &StateDir,
    tracker: &Tracker,
    record: &mut Record,
    tree: &UndoTree,
    units: Option<&[Action]>,
) -> Undone {
    let obstacles = obstacles::obstacles(Below::Unmount);
    if !obstacles.is_empty() {
        return Undone { failed: vec![obstacles::message(&obstacles)], ..Undone::default() };
    }
    let mut undone = Undone { kept: stop_units(tracker, units.unwrap_or_default()).await, ..Undone::default() };
    let files = FileSteps { dir: paths.clone(), tree: tree.clone() };
    let mut live = units.map(|units| LiveUndo { dir: paths, tracker, tree, units, manager: None });
    let mut _guard = None;
    for step in SwitchStep::UNDO {
        let is_skipped = match step {
            // Without the mark, the generator would arm the pivot again.
            SwitchStep::File(FileStep::Marker) => !undone.failed.is_empty(),
            SwitchStep::File(_) => false,
            SwitchStep::Live(_) => live.is_none(),
        };
        if is_skipped {
            continue;
        }
        // A full disk must not prevent the undo. The record says already that it has begun.
        if let Err(error) = record.begin(step, paths) {
            warn!("{error:#}");
        }
        let (span, failures) = (tracker.span(Subject::UndoStep, step.describe()), undone.failed.len());
        match (step, &mut live) {
            (SwitchStep::File(step), live) => {
                // From here on PID 1 may be unable to start services until its re-execution.
                if step == FileStep::Usr && live.is_some() {
                    guard(&mut _guard).await;
                }
                let files = files.clone();
                let act = tokio::task::spawn_blocking(move || files.undo(step)).await;
                undone.extend(act.unwrap_or_else(|error| Err(anyhow::anyhow!("undo panicked: {error}")).into()));
            }
            (SwitchStep::Live(step), Some(live)) => live.undo(step, &mut undone).await,
            (SwitchStep::Live(_), None) => {}
        }
        span.end(undone.failed.get(failures).map(|failure| failure as &dyn Display));
    }
    for line in undone.kept.iter().chain(&undone.failed) {
        warn!("undo: {line}");
    }
    undone
}
