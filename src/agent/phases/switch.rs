//! Switch: sets the ref, exposes `/usr` with one `move_mount`, and applies the plan for `/etc`.
//!
//! The record says `switching` before the first act, so an agent that is started after a kill finds it. Each act can be
//! repeated. If an act fails, the agent rolls back the earlier ones.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context as _;
use boot_config::mark;
use tracing::info;

use crate::agent::new_usr::{ETC, USR, USR_SOURCE, new_etc};
use crate::agent::state::load_etc_plan;
use crate::agent::{Context, Error, Paths, StagedRoot, Switched, storage};
use crate::report::{Phase, State};
use node_store::store::NODE_IMAGE_REF;
use support::directory::Directory;
use support::failpoint::{self, Point};

/// Exposes the new `/usr` and merges `/etc`.
pub(super) async fn switch(context: &Context, staged: StagedRoot) -> Result<Switched, Error> {
    let phase = Phase::Switch;
    context.tracker.begin(phase);
    let paths = context.paths.clone();
    // Until the refresh has re-executed PID 1.
    context.guard().await;
    let (staged, report) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let report = blocking(&paths, &staged)?;
        Ok((staged, report))
    })
    .await
    .context("the switch panicked")??;
    for line in report.to_string().lines() {
        info!("{line}");
    }
    for skipped in &report.skipped {
        context.tracker.note(format!("left alone: /etc/{}: {}", skipped.path, skipped.reason));
    }
    // Not yet in the state `switched`: until the refresh, running programs are the bootimage's.
    context.tracker.end(phase, State::Running);
    Ok(Switched { staged, units: Vec::new() })
}

/// Checks the disk space for the files of the merge. Changes nothing.
///
/// # Errors
/// A refusal with the missing bytes.
pub(super) fn check(paths: &Paths) -> Result<(), Error> {
    let plan = load_etc_plan(paths)?;
    let refusals = etc_merge::check_room(&plan, Path::new(ETC), paths.run())?;
    if refusals.is_empty() {
        return Ok(());
    }
    Err(Error::refused("too-little", refusals.join("; ")))
}

fn blocking(paths: &Paths, staged: &StagedRoot) -> anyhow::Result<etc_merge::Report> {
    let usr = Path::new(USR);
    let plan = load_etc_plan(paths)?;
    let run = Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
    set_ref(paths, staged, true)?;
    // Before /usr changes, so that a generator that runs afterwards does not arm the pivot again.
    mark::pivoted_text(Path::new("/"))
        .and_then(|text| run.write_atomic(Paths::PIVOTED, 0o644, text.as_bytes()))
        .with_context(|| format!("cannot write {}", paths.pivoted().display()))?;

    if !overlay_root::exposed(usr, USR_SOURCE)? {
        overlay_root::open_new_usr(&staged.delta.directory, usr, USR_SOURCE)?.expose(usr)?;
    }
    let new = new_etc(etc_merge::open_dir(usr)?.as_fd())?;
    let current = etc_merge::open_dir(Path::new(ETC))?;
    // Before the merge. A listed entry counts for a later merge only if /etc still has its content.
    remember_defaults(paths, staged, &plan.later())?;
    etc_merge::apply(&plan, new.as_fd(), current.as_fd(), &paths.etc_undo())
}

/// Stores the list of the defaults in `/etc` that came from node images, for the merge of the next boot.
pub(super) fn remember_defaults(paths: &Paths, staged: &StagedRoot, list: &etc_merge::Defaults) -> anyhow::Result<()> {
    let text = serde_json::to_vec(list).context("cannot write the list of defaults")?;
    let text = (!list.is_empty()).then_some(text);
    storage::of(paths, staged)?
        .write_etc_defaults(text.as_deref())
        .context("cannot store the list of the defaults that the merge of /etc takes")
}

/// Sets the ref of the node image in use, or removes it for an undo (`there` is false).
pub(super) fn set_ref(paths: &Paths, staged: &StagedRoot, there: bool) -> anyhow::Result<()> {
    let detail = if there { "set" } else { "remove" };
    let store = storage::of(paths, staged)?;
    failpoint::hit(Point::Ref, detail)
        .and_then(|()| if there { store.set_ref(&staged.pulled.commit) } else { store.remove_ref() })
        .with_context(|| format!("cannot {detail} the ref {NODE_IMAGE_REF} in {}", store.repo_path().display()))
}
