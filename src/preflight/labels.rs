//! Looks up labels for the entries of an /etc plan in the node image's SELinux policy.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, Result};
use ostree::gio;

/// Sets the label of every entry that the plan writes, as the policy in the new tree defines it. `usr` is the new `/usr`
/// directory, `scratch` an existing directory that only this agent uses. Returns the number of labelled entries: 0 if the
/// tree has no policy.
///
/// libselinux keeps one policy root per process: nothing else may look labels up meanwhile.
///
/// # Errors
/// libostree cannot use the tree's policy. The plan may be labelled in part.
pub fn label_plan(plan: &mut etc_merge::Plan, usr: BorrowedFd<'_>, scratch: &Path) -> Result<usize> {
    // libostree accepts only the path of a root directory.
    let root = policy_root(scratch).context("cannot create a directory for the SELinux policy")?;
    let link = format!("/proc/self/fd/{}", usr.as_raw_fd());
    let labelled = std::os::unix::fs::symlink(link, root.join("usr"))
        .map_err(anyhow::Error::from)
        .and_then(|()| label(plan, &root));
    let _ = std::fs::remove_dir_all(&root);
    labelled.context("cannot use the node image's SELinux policy (/usr/etc/selinux)")
}

fn policy_root(scratch: &Path) -> std::io::Result<std::path::PathBuf> {
    let root = scratch.join("policy-root");
    support::ignore_missing(std::fs::remove_dir_all(&root))?;
    std::fs::create_dir(&root)?;
    Ok(root)
}

fn label(plan: &mut etc_merge::Plan, root: &Path) -> Result<usize> {
    let policy = selinux_labels::open_policy(root)?;
    if policy.name().is_none() {
        return Ok(0);
    }
    let mut labelled = 0;
    for change in &mut plan.changes {
        let Some(after) = &change.after else { continue };
        // File contexts are text, so no rule matches a name that is not UTF-8.
        let Ok(path) = std::str::from_utf8(&change.path.0) else { continue };
        let path = if path.is_empty() { "/etc".to_owned() } else { format!("/etc/{path}") };
        let label = policy.label(&path, after.raw_mode(), gio::Cancellable::NONE);
        change.label = label
            .with_context(|| format!("cannot look up the label of {path}"))?
            .map(|label| etc_merge::Bytes(label.as_bytes().iter().copied().chain([0]).collect()));
        labelled += usize::from(change.label.is_some());
    }
    Ok(labelled)
}
