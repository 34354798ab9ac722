//! Switch: one `move_mount`, then the `/etc` plan. Also the way back.
//!
//! Whatever may fail is done before the first act. The record says `switching` by then, so a daemon
//! that is killed in here finds it, and each act can be done again.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context as _;
use tracing::{info, warn};

use super::prepare::{ETC, USR, USR_SOURCE, new_etc};
use super::{Context, Error, Paths, StagedRoot, Switched};
use crate::dirfd::Directory;
use crate::report::{Phase, State};
use crate::units::Manager;
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
    context.tracker.end(phase, State::Switched);
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

/// Puts `/etc` and `/usr` back. Everything is tried; what could not be put back is returned.
pub(super) async fn undo(context: &Context, _staged: &StagedRoot) -> Result<Vec<String>, Error> {
    let paths = context.paths.clone();
    let mut left = tokio::task::spawn_blocking(move || {
        let mut left = Vec::new();
        match etc::open_dir(Path::new(ETC)).and_then(|dir| etc::undo(&paths.etc_undo(), dir.as_fd())) {
            Ok(report) => {
                left.extend(report.kept.iter().map(|entry| format!("/etc/{} stays: {}", entry.path, entry.reason)));
                left.extend(report.failed.iter().map(|entry| format!("/etc/{}: {}", entry.path, entry.reason)));
            }
            Err(error) => left.push(format!("/etc: {error:#}")),
        }
        if let Err(error) = mount::withdraw(Path::new(USR), USR_SOURCE) {
            left.push(format!("/usr: {error:#}"));
        }
        if let Err(error) = Directory::ensure(paths.run()).and_then(|run| run.remove_all(Paths::PIVOTED)) {
            left.push(format!("{}: {error}", paths.pivoted().display()));
        }
        left
    })
    .await
    .context("undo panicked; run it again")?;
    // PID 1 must read the old unit files again, and be the old program again.
    let back = async { Manager::connect().await?.reexecute().await.map(drop) };
    if let Err(error) = back.await {
        left.push(format!("systemd: {error:#}"));
    }
    for line in &left {
        warn!("undo: {line}");
    }
    Ok(left)
}
