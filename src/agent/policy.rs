//! The SELinux policy: the refresh loads the node image's, an undo the bootimage's.

use std::os::fd::AsFd;
use std::path::Path;

use tracing::{info, warn};

use super::new_usr::{ETC, USR, USR_SOURCE};
use super::{StagedRoot, StateDir};
use crate::host;
use crate::report::Tracker;
use overlay_root::delta::Delta;

/// Loads the policy in `/etc` if the merge replaced it, and sets the labels that only the new policy knows on merged
/// entries. Idempotent.
pub(super) async fn load_policy(tracker: &Tracker, dir: &StateDir, staged: &StagedRoot) -> anyhow::Result<()> {
    let plan = staged.load(dir)?;
    let step = policy_step(&plan);
    if let Some(remark) = host::load_policy(step).await? {
        tracker.remark(&remark);
    }
    if step.loads() && selinux_labels::mode() != selinux_labels::Mode::Disabled {
        let relabelled = etc_merge::relabel(&plan, etc_merge::open_dir(Path::new(ETC))?.as_fd())?;
        info!("relabelled {relabelled} entries of /etc with labels that the previous policy did not know");
        relabel(dir, &staged.delta, Way::There).await;
    }
    Ok(())
}

/// Direction of a relabelling: from the booted policy's labels to the node image's, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    There,
    Back,
}

/// Sets the labels of the loaded policy on the entries of `/dev`, `/etc` and `/run`. Logs a warning for each entry that
/// keeps an old label, and returns true if there is none.
pub(super) async fn relabel(paths: &StateDir, delta: &Delta, way: Way) -> bool {
    if selinux_labels::mode() == selinux_labels::Mode::Disabled {
        return true;
    }
    let (delta, scratch) = (delta.directory.join("etc/selinux"), paths.run().to_owned());
    let act = move || -> anyhow::Result<selinux_labels::Relabelled> {
        let booted = Path::new("/usr/etc/selinux");
        let (old, new) = overlay_root::Namespace::init().run_without(Path::new(USR), USR_SOURCE, || {
            Ok((selinux_labels::FileContexts::read(&[booted])?, selinux_labels::FileContexts::read(&[&delta, booted])?))
        })?;
        let directories = selinux_labels::LABELLED.map(Path::new);
        match way {
            Way::There => old.relabel(&new, &directories, overlay_root::tmpfs_label()?.as_deref(), &scratch),
            Way::Back => new.relabel(&old, &directories, None, &scratch),
        }
    };
    match tokio::task::spawn_blocking(act).await.map_err(anyhow::Error::from).and_then(|done| done) {
        Ok(selinux_labels::Relabelled { changed, failed }) => {
            info!("relabelled {changed} entries of /dev, /etc and /run for the loaded policy");
            for line in &failed {
                warn!("an entry keeps the label of the previous policy: {line}");
            }
            failed.is_empty()
        }
        Err(error) => {
            warn!("/dev, /etc and /run keep the labels of the previous policy: {error:#}");
            true
        }
    }
}

/// Returns the step for the SELinux policy that the merge of `/etc` requires, for switch and undo.
pub(super) fn policy_step(plan: &etc_merge::Plan) -> host::PolicyStep {
    host::policy_step(
        // On a disk, the merge of an earlier boot may have replaced the policy files already, while this boot loaded
        // another policy.
        plan.changes
            .iter()
            .map(|change| change.path.0.as_slice())
            .chain(plan.of(etc_merge::Class::Converged).map(|decision| decision.path.0.as_slice()))
            .chain(plan.earlier.paths().map(|path| path.0.as_slice())),
        plan.of(etc_merge::Class::Conflict).map(|decision| decision.path.0.as_slice()),
    )
}
