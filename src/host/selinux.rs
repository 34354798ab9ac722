//! Loads the SELinux policy in `/etc` if it differs from the one that was loaded at boot.
//!
//! The plan for `/etc` shows the difference. The kernel's copy (`/sys/fs/selinux/policy`) cannot be compared: the kernel
//! writes it in its own form, which never equals the file.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::report::Remark;
use selinux_labels::Mode;
use support::command::run;

/// Time limit for loading a policy: the kernel converts every label in memory.
const LOAD: Duration = Duration::from_secs(120);

/// The consequence of the merge of `/etc` for the loaded policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyStep {
    /// The merge does not change the policy in `/etc`.
    Keep,
    /// The merge changes the policy in `/etc`.
    Load,
    /// The merge changes the policy in `/etc` and keeps a policy file of another format version with local changes.
    LoadBesideLocal,
    /// The merge keeps a policy with local changes although the node image has another one.
    KeptLocal,
}

impl PolicyStep {
    /// Returns true if another policy must be loaded.
    pub fn loads(self) -> bool {
        matches!(self, Self::Load | Self::LoadBesideLocal)
    }
}

/// Returns the step that a merge makes necessary. `written` are the paths, relative to `/etc`, that it writes or removes;
/// `conflicts` are those whose local version stays although the node image changed them.
pub fn policy_step<'a>(
    mut written: impl Iterator<Item = &'a [u8]>,
    mut conflicts: impl Iterator<Item = &'a [u8]>,
) -> PolicyStep {
    match (written.any(is_policy), conflicts.any(is_policy)) {
        (true, false) => PolicyStep::Load,
        (true, true) => PolicyStep::LoadBesideLocal,
        (false, true) => PolicyStep::KeptLocal,
        (false, false) => PolicyStep::Keep,
    }
}

/// Returns true for `selinux/TYPE/policy/policy.NN` and for the file that names TYPE.
fn is_policy(path: &[u8]) -> bool {
    let mut parts = path.split(|&byte| byte == b'/');
    match [parts.next(), parts.next(), parts.next(), parts.next(), parts.next()] {
        [Some(b"selinux"), Some(b"config"), None, ..] => true,
        [Some(b"selinux"), Some(_), Some(b"policy"), Some(file), None] => file.starts_with(b"policy."),
        _ => false,
    }
}

/// Loads the policy in `/etc` if `step` requires it. Loading it again is harmless. Returns a line for the record, or
/// `None` if the policy is unchanged.
///
/// # Errors
/// The policy cannot be loaded and SELinux is enforcing, so that access to files with new labels would be denied. In
/// permissive mode, the failure is the returned warning.
pub async fn load_policy(step: PolicyStep) -> Result<Option<Remark>> {
    load_with(&["load_policy"], selinux_labels::mode(), step).await
}

async fn load_with(command: &[&str], mode: Mode, step: PolicyStep) -> Result<Option<Remark>> {
    let done = |line: &str| Ok(Some(Remark::Done(line.to_owned())));
    let warning = |line: &str| Ok(Some(Remark::Warning(line.to_owned())));
    match (mode, step) {
        (_, PolicyStep::Keep) | (Mode::Disabled, PolicyStep::KeptLocal) => Ok(None),
        (Mode::Disabled, PolicyStep::Load | PolicyStep::LoadBesideLocal) => {
            done("SELinux is disabled: the new policy in /etc/selinux is not loaded")
        }
        (_, PolicyStep::KeptLocal) => warning(
            "the SELinux policy in /etc/selinux has local changes and stays, so the types that only the node image's policy \
             defines are unknown; run semodule --build",
        ),
        (_, PolicyStep::Load | PolicyStep::LoadBesideLocal) => match run(command, LOAD).await {
            Ok(_) if step == PolicyStep::LoadBesideLocal => warning(
                "the SELinux policy in /etc/selinux differs and was loaded, without the local changes that are in a \
                 policy file of another version; run semodule --build",
            ),
            Ok(_) => done("the SELinux policy in /etc/selinux differs and was loaded"),
            Err(error) if mode == Mode::Permissive => {
                warning(&format!("cannot load the new SELinux policy (continuing, SELinux is permissive): {error:#}"))
            }
            Err(error) => Err(error).context("cannot load the new SELinux policy"),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn step(written: &[&str], conflicts: &[&str]) -> PolicyStep {
        policy_step(written.iter().map(|path| path.as_bytes()), conflicts.iter().map(|path| path.as_bytes()))
    }

    #[tokio::test]
    async fn a_policy_that_cannot_be_loaded_fails_only_if_enforcing() {
        use Mode::{Disabled, Enforcing, Permissive};
        use PolicyStep::{Keep, KeptLocal, Load, LoadBesideLocal};
        for (mode, step, command, expected) in [
            (Enforcing, Keep, "false", None),
            (Disabled, KeptLocal, "false", None),
            (Disabled, Load, "false", Some((false, "SELinux is disabled"))),
            (Disabled, LoadBesideLocal, "false", Some((false, "SELinux is disabled"))),
            (Enforcing, KeptLocal, "false", Some((true, "has local changes and stays"))),
            (Enforcing, Load, "true", Some((false, "differs and was loaded"))),
            (Permissive, Load, "true", Some((false, "differs and was loaded"))),
            (Enforcing, LoadBesideLocal, "true", Some((true, "was loaded, without the local changes"))),
            (Permissive, Load, "false", Some((true, "SELinux is permissive): false failed (exit status: 1)"))),
        ] {
            let remark = load_with(&[command], mode, step).await.unwrap();
            let (warns, line) = match &remark {
                None => (false, ""),
                Some(Remark::Done(line)) => (false, line.as_str()),
                Some(Remark::Warning(line)) => (true, line.as_str()),
            };
            assert_eq!(remark.is_some(), expected.is_some(), "{mode:?} {step:?}");
            let (expected_warning, part) = expected.unwrap_or_default();
            assert_eq!(warns, expected_warning, "{mode:?} {step:?}: {line}");
            assert!(line.contains(part) && !line.contains("warning:"), "{mode:?} {step:?}: {line}");
        }
        let error = load_with(&["false"], Enforcing, Load).await.unwrap_err().to_string();
        assert_eq!(error, "cannot load the new SELinux policy");
    }

    #[test]
    fn the_policy_is_loaded_if_the_merge_changes_it() {
        use PolicyStep::{Keep, KeptLocal, Load, LoadBesideLocal};
        let policy = "selinux/targeted/policy/policy.33";
        assert_eq!(step(&[], &[]), Keep);
        assert_eq!(step(&["selinux/targeted/contexts/files/file_contexts", "selinux", "selinux/x/policy"], &[]), Keep);
        assert_eq!(step(&["motd", policy], &[]), Load);
        assert_eq!(step(&["selinux/config"], &[]), Load);
        assert_eq!(step(&["selinux/config.old", "x/selinux/config", "selinux/config/x"], &[]), Keep);
        assert_eq!(step(&[], &["selinux/targeted/active/commit_num"]), Keep);
        assert_eq!(step(&[], &[policy]), KeptLocal);
        // A policy of another format version beside the one with local changes.
        assert_eq!(step(&["selinux/targeted/policy/policy.34"], &[policy]), LoadBesideLocal);
        assert!(Load.loads() && LoadBesideLocal.loads() && !KeptLocal.loads() && !Keep.loads());
    }
}
