//! Switch: one `move_mount`, then the `/etc` plan. Also the way back.
//!
//! Whatever may fail is done before the first act. The record says `switching` by then, so a daemon
//! that is killed in here finds it, and each act can be done again.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context as _;
use tracing::{info, warn};

use super::after::RESTART;
use super::prepare::{ETC, USR, USR_SOURCE, new_etc};
use super::{Context, Error, Paths, StagedRoot, Switched};
use crate::dirfd::Directory;
use crate::report::{Phase, State};
use crate::units::{self, Class, Flow, Manager, RunningUnit, Version};
use crate::{etc, mount, stage};

/// Exposes the new `/usr` and merges `/etc`.
pub(super) async fn switch(context: &Context, staged: StagedRoot) -> Result<Switched, Error> {
    let phase = Phase::Switch;
    context.tracker.begin(phase);
    let paths = context.paths.clone();
    let (staged, report) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let report = blocking(&paths, &staged)?;
        Ok((staged, report))
    })
    .await
    .context("the switch panicked; start node-image-overlay.service again to finish it, or run undo")??;
    for line in report.to_string().lines() {
        info!("{line}");
    }
    for skipped in &report.skipped {
        context.tracker.note(format!("left alone: /etc/{}: {}", skipped.path, skipped.reason));
    }
    // Not switched before the refresh: until then the machine is between the two.
    context.tracker.end(phase, State::Running);
    Ok(Switched { staged, units: Vec::new() })
}

fn blocking(paths: &Paths, staged: &StagedRoot) -> anyhow::Result<etc::Report> {
    let usr = Path::new(USR);
    let run = Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
    let plan =
        run.read_optional(Paths::ETC_PLAN)?.context("the plan for /etc is missing; run undo, then start again")?;
    let plan: etc::Plan = serde_json::from_slice(&plan).context("the plan for /etc is damaged; run undo")?;
    // Before /usr changes: a generator that runs from here on must not arm the pivot again.
    run.write_atomic(Paths::PIVOTED, 0o644, staged.pulled.image.pinned.as_bytes())
        .with_context(|| format!("cannot write {}; nothing was changed", paths.pivoted().display()))?;

    if !mount::exposed(usr, USR_SOURCE)? {
        stage::open_new_usr(&staged.delta.directory, usr, USR_SOURCE)?.expose(usr)?;
    }
    let new = new_etc(etc::open_dir(usr)?.as_fd())?;
    let current = etc::open_dir(Path::new(ETC))?;
    etc::apply(&plan, new.as_fd(), current.as_fd(), &paths.etc_undo(), None)
        .context("/usr is switched, /etc is not complete: start node-image-overlay.service again, or run undo")
}

/// How an undo went.
#[derive(Debug, Default)]
pub(super) struct Undone {
    /// What stays on purpose, such as files that somebody changed since.
    pub(super) kept: Vec<String>,
    /// What could not be put back.
    pub(super) failed: Vec<String>,
}

/// Puts `/etc` and `/usr` back. Everything is tried, whatever fails.
pub(super) async fn undo(paths: &Paths, staged: &StagedRoot, flow: Flow) -> Undone {
    // Before anything goes: afterwards nobody can tell what ran the node image's code.
    let running = survey(staged).await;
    let for_files = paths.clone();
    let mut undone = match tokio::task::spawn_blocking(move || undo_files(&for_files)).await {
        Ok(undone) => undone,
        Err(error) => Undone { failed: vec![format!("undo panicked: {error}")], ..Undone::default() },
    };
    let running = running.unwrap_or_else(|error| {
        undone.kept.push(format!("cannot tell what runs the node image's code, restart sshd by hand: {error:#}"));
        Vec::new()
    });
    if let Err(error) = undo_units(&running, flow, &mut undone.kept).await {
        undone.failed.push(format!("systemd: {error:#}"));
    }
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

/// What runs the node image's code now. It is looked at, not taken from what the switch recorded: a
/// refresh that failed half-way has no complete record.
async fn survey(staged: &StagedRoot) -> anyhow::Result<Vec<RunningUnit>> {
    let delta = staged.delta.lookup()?;
    let differs = |path: &Path| delta.contains(path).unwrap_or(true);
    let (running, unseen) = units::survey(&Manager::connect().await?, Version::Current, &differs).await?;
    for line in unseen {
        warn!("undo: {line}");
    }
    Ok(running)
}

/// PID 1 must be the old program again, with the old unit files, and so must be what ran the node
/// image's code: sshd's helpers, for one, are the old ones again.
async fn undo_units(running: &[RunningUnit], flow: Flow, kept: &mut Vec<String>) -> anyhow::Result<()> {
    let manager = Manager::connect().await?.reexecute().await?;
    for action in units::plan(running, flow) {
        match action.class {
            Class::None => {}
            Class::Restart => {
                if let Err(error) = manager.try_restart(&action.unit, RESTART).await {
                    kept.push(format!("{error:#}"));
                }
            }
            Class::Never => info!("undo leaves {} alone: {}", action.unit, action.reason),
        }
    }
    Ok(())
}

fn undo_files(paths: &Paths) -> Undone {
    let mut undone = Undone::default();
    match etc::open_dir(Path::new(ETC)).and_then(|dir| etc::undo(&paths.etc_undo(), dir.as_fd())) {
        Ok(report) => {
            undone.kept.extend(report.kept.iter().map(|entry| format!("/etc/{} stays: {}", entry.path, entry.reason)));
            undone.failed.extend(report.failed.iter().map(|entry| format!("/etc/{}: {}", entry.path, entry.reason)));
        }
        Err(error) => undone.failed.push(format!("/etc: {error:#}")),
    }
    if let Err(error) = mount::withdraw(Path::new(USR), USR_SOURCE) {
        undone.failed.push(format!("/usr: {error:#}"));
    }
    undone
}
