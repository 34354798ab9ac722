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
use crate::agent::{Context, Error, StagedRoot, StateDir, SwitchPlan, Switched, storage};
use crate::report::{Phase, State};
use node_store::store::NODE_IMAGE_REF;
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

/// Checks the plans, and the disk space for the files of the merge. Changes nothing.
///
/// # Errors
/// A refusal with the missing bytes, or with the plan that cannot be used.
pub(super) fn check(paths: &StateDir, staged: &StagedRoot) -> Result<(), Error> {
    let plan = staged.load::<etc_merge::Plan>(paths)?;
    staged.load::<SwitchPlan>(paths)?;
    let refusals = etc_merge::check_room(&plan, Path::new(ETC), paths.run())?;
    if refusals.is_empty() {
        return Ok(());
    }
    Err(Error::refused("too-little", refusals.join("; ")))
}

fn blocking(paths: &StateDir, staged: &StagedRoot) -> anyhow::Result<etc_merge::Report> {
    let usr = Path::new(USR);
    let plan = staged.load::<etc_merge::Plan>(paths)?;
    set_ref(paths, staged, true)?;
    // Before /usr changes, so that a generator that runs afterwards does not arm the pivot again.
    paths.write(StateDir::PIVOTED, 0o644, mark::pivoted_text(Path::new("/"))?.as_bytes())?;

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
pub(super) fn remember_defaults(
    paths: &StateDir,
    staged: &StagedRoot,
    list: &etc_merge::Defaults,
) -> anyhow::Result<()> {
    let text = serde_json::to_vec(list).context("cannot write the list of defaults")?;
    let text = (!list.is_empty()).then_some(text);
    storage::of(paths, staged)?
        .write_etc_defaults(text.as_deref())
        .context("cannot store the list of the defaults that the merge of /etc takes")
}

/// Sets the ref of the node image in use, or removes it for an undo (`there` is false).
pub(super) fn set_ref(paths: &StateDir, staged: &StagedRoot, there: bool) -> anyhow::Result<()> {
    let detail = if there { "set" } else { "remove" };
    let store = storage::of(paths, staged)?;
    failpoint::hit(Point::Ref, detail)
        .and_then(|()| if there { store.set_ref(&staged.pulled.commit) } else { store.remove_ref() })
        .with_context(|| format!("cannot {detail} the ref {NODE_IMAGE_REF} in {}", store.repo_path().display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::agent::state::{StateFile, switched};

    #[test]
    fn a_plan_that_is_not_the_records_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir::below(temp.path());
        let mut staged = switched().staged;
        let plan = etc_merge::Plan::default();
        let checksum = staged.save(&plan, &dir).unwrap();
        staged.plans.insert(etc_merge::Plan::NAME.to_owned(), checksum);
        assert!(staged.load::<etc_merge::Plan>(&dir).is_ok());
        let decision = r#"{"path": "x", "class": "conflict", "reason": "r"}"#;
        let other = etc_merge::Plan { decisions: vec![serde_json::from_str(decision).unwrap()], ..plan };
        staged.save(&other, &dir).unwrap();
        let refused = check(&dir, &staged).unwrap_err();
        let entry = refused.last_error();
        assert_eq!(entry.refusals[0].id, "state-file");
        assert!(entry.message.contains("etc-plan.json: it does not match the record"), "{refused}");
    }
}
