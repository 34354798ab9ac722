//! Stage: the delta tree, the `/etc` plan and every check that can refuse, before anything changes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::Context as _;
use ostree::gio::Cancellable;
use tracing::info;

use super::{Context, Error, Paths, StagedRoot};
use crate::config::EtcStrategy;
use crate::etc::{self, Class, Plan};
use crate::import::PulledImage;
use crate::mount::Namespace;
use crate::report::{Phase, State};
use crate::stage::{self, Booted, Keep, Refusals};
use crate::store::{NodeStore, ObjectType};

/// What mount tables show for the exposed `/usr`.
pub(super) const USR_SOURCE: &str = "node-image";
pub(super) const USR: &str = "/usr";
pub(super) const ETC: &str = "/etc";

/// Objects to a delta tree and plans.
pub(super) async fn stage(context: &Context, pulled: PulledImage) -> Result<StagedRoot, Error> {
    let phase = Phase::Stage;
    context.tracker.begin(phase);
    let paths = context.paths.clone();
    let strategy = context.settings.etc_strategy;
    // libostree's objects must stay on one thread.
    let staged = tokio::task::spawn_blocking(move || blocking(&paths, pulled, strategy))
        .await
        .context("staging panicked; the running system is untouched")??;
    for line in staged.plan_lines() {
        info!("{line}");
        context.tracker.note(line);
    }
    context.tracker.end(phase, State::Pulled);
    Ok(staged)
}

fn blocking(paths: &Paths, pulled: PulledImage, strategy: EtcStrategy) -> Result<StagedRoot, Error> {
    let mounts = Namespace::init().mounts()?;
    refuse(stage::check_system(&mounts, Path::new(USR), Path::new(ETC)))?;

    let store = NodeStore::open(&paths.store())?;
    let repo = ostree::Repo::new_for_path(store.repo_path());
    repo.open(Cancellable::NONE).context("cannot open the node store; the running system is untouched")?;
    let booted = match &pulled.booted_commit {
        Some(commit) => Booted::Commit(commit),
        None => Booted::Directory(Path::new(USR)),
    };
    let own_object = |name: &str| {
        let path = store.object_path(&name.parse().ok()?, ObjectType::File);
        path.symlink_metadata().is_ok().then_some(path)
    };
    let delta = stage::build_delta(&repo, booted, &pulled.commit, &own_object, &paths.delta(), &Keep::default())?;

    let tree = stage::open_new_usr(&delta.directory, Path::new(USR), USR_SOURCE)?;
    refuse(stage::check_tree(&tree))?;

    let base = etc::open_dir(Path::new("/usr/etc"))?;
    let current = etc::open_dir(Path::new(ETC))?;
    let plan = etc::plan(base.as_fd(), new_etc(tree.as_fd())?.as_fd(), current.as_fd())?;
    if strategy == EtcStrategy::Fail {
        etc::refuse_conflicts(&plan).map_err(|error| Error::Refused(format!("{error:#}")))?;
    }
    let text = serde_json::to_vec(&plan).context("cannot write the plan for /etc")?;
    crate::dirfd::Directory::ensure(paths.run())
        .and_then(|dir| dir.write_atomic(Paths::ETC_PLAN, 0o600, &text))
        .context("cannot store the plan for /etc; nothing was changed")?;
    Ok(StagedRoot { pulled, delta, etc: etc_lines(&plan) })
}

/// How many entries of each class, and the conflicts by name.
fn etc_lines(plan: &Plan) -> Vec<String> {
    let counts: Vec<_> = Class::ALL.iter().map(|&class| format!("{} {class}", plan.count(class))).collect();
    let mut lines = vec![counts.join(", ")];
    lines.extend(plan.of(Class::Conflict).map(|conflict| format!("conflict: {} ({})", conflict.path, conflict.reason)));
    lines
}

/// The node image's defaults: `etc` in its `/usr`.
pub(super) fn new_etc(usr: BorrowedFd<'_>) -> anyhow::Result<OwnedFd> {
    etc::open_defaults(usr)?.context("the node image has no /usr/etc: it is no ostree system; use another node image")
}

fn refuse(refusals: Vec<stage::Refusal>) -> Result<(), Error> {
    if refusals.is_empty() { Ok(()) } else { Err(Error::Refused(Refusals(refusals).to_string())) }
}
