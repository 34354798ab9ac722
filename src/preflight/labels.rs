//! Labels for what is written to `/etc`, by the node image's own SELinux policy.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, Result};
use ostree::gio;

/// Gives every entry that the plan writes the label that the policy in the new tree has for it. `usr` is the new
/// `/usr` directory, `scratch` an existing directory of ours. Returns how many got one: none where the tree has no policy.
///
/// libselinux keeps one policy root per process: nothing else may look labels up meanwhile.
///
/// # Errors
/// When the tree has a policy that libostree cannot use.
pub fn label_plan(plan: &mut etc_merge::Plan, usr: BorrowedFd<'_>, scratch: &Path) -> Result<usize> {
    // libostree takes the path of a root directory.
    let root = tempfile_in(scratch).context("making a directory for the policy")?;
    let link = format!("/proc/self/fd/{}", usr.as_raw_fd());
    let labelled = std::os::unix::fs::symlink(link, root.join("usr"))
        .map_err(anyhow::Error::from)
        .and_then(|()| label(plan, &root));
    let _ = std::fs::remove_dir_all(&root);
    labelled.context("the node image's SELinux policy (/usr/etc/selinux) cannot be used")
}

fn tempfile_in(scratch: &Path) -> std::io::Result<std::path::PathBuf> {
    let root = scratch.join("policy-root");
    match std::fs::remove_dir_all(&root) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
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
        // A policy is written in text: a name that is none has the label of its directory at best.
        let Ok(path) = std::str::from_utf8(&change.path.0) else { continue };
        let path = if path.is_empty() { "/etc".to_owned() } else { format!("/etc/{path}") };
        let label = policy.label(&path, after.raw_mode(), gio::Cancellable::NONE);
        change.label = label
            .with_context(|| format!("looking up the label of {path}"))?
            .map(|label| etc_merge::Bytes(label.as_bytes().iter().copied().chain([0]).collect()));
        labelled += usize::from(change.label.is_some());
    }
    Ok(labelled)
}
