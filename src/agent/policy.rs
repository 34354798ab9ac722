//! The SELinux policy: the refresh loads the node image's, an undo the bootimage's.

use std::os::fd::AsFd;
use std::path::Path;

use tracing::{info, warn};

use super::new_usr::{ETC, USR, USR_SOURCE};
use super::state::load_etc_plan;
use super::{Context, Paths, StagedRoot};
use crate::host;

/// Gives the kernel the policy that is in `/etc`, if the merge brought another, and what the merge wrote the labels that
/// only that one knows. Doing it again is harmless.
pub(super) async fn load_policy(context: &Context, staged: &StagedRoot) -> anyhow::Result<()> {
    let plan = load_etc_plan(&context.paths)?;
    let step = policy_step(&plan);
    if let Some(remark) = host::load_policy(step).await? {
        context.tracker.remark(&remark);
    }
    if step.loads() && selinux_labels::mode() != selinux_labels::Mode::Disabled {
        let relabelled = etc_merge::relabel(&plan, etc_merge::open_dir(Path::new(ETC))?.as_fd())?;
        info!("/etc: {relabelled} entries got labels that the policy from before did not know");
        label_anew(&context.paths, staged, Way::There).await;
    }
    Ok(())
}

/// From the booted policy's labels to the node image's, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    There,
    Back,
}

/// Gives what is in `/dev`, `/etc` and `/run` the labels of the policy that was loaded. What keeps an old one is worth a
/// warning, no more. Returns whether there is nothing of that kind.
pub(super) async fn label_anew(paths: &Paths, staged: &StagedRoot, way: Way) -> bool {
    if selinux_labels::mode() == selinux_labels::Mode::Disabled {
        return true;
    }
    let (delta, scratch) = (staged.delta.directory.join("etc/selinux"), paths.run().to_owned());
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
            info!("/dev, /etc and /run: {changed} entries got the labels of the policy that was loaded");
            for line in &failed {
                warn!("this keeps the label of the policy from before: {line}");
            }
            failed.is_empty()
        }
        Err(error) => {
            warn!("/dev, /etc and /run keep the labels of the policy from before: {error:#}");
            true
        }
    }
}

/// What the merge of `/etc` means for the SELinux policy, before and after an undo alike.
pub(super) fn policy_step(plan: &etc_merge::Plan) -> host::PolicyStep {
    host::policy_step(
        // On a disk an earlier boot's merge may have brought it already, and this boot have loaded another.
        plan.changes
            .iter()
            .map(|change| change.path.0.as_slice())
            .chain(plan.of(etc_merge::Class::Converged).map(|decision| decision.path.0.as_slice()))
            .chain(plan.earlier.paths().map(|path| path.0.as_slice())),
        plan.of(etc_merge::Class::Conflict).map(|decision| decision.path.0.as_slice()),
    )
}
