//! The SELinux policy: the node image's is loaded when it differs from the one that was loaded at boot.
//!
//! The kernel's own copy (`/sys/fs/selinux/policy`) is written anew by the kernel and never equals the file, so files
//! are compared: the merge of `/etc` knows which of them it replaces.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::report::Remark;
use selinux_labels::Mode;
use support::command::run;

/// How long loading may take. The kernel converts every label that it holds.
const LOAD: Duration = Duration::from_secs(120);

/// What the merge of `/etc` means for the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyStep {
    /// The policy that is loaded is the one in `/etc`.
    Keep,
    /// `/etc` has another one.
    Load,
    /// `/etc` has another one, in another version of the format than one with local changes, which stayed beside it.
    LoadBesideLocal,
    /// The node image has another one, and the one in `/etc` has local changes: that one stayed.
    KeptLocal,
}

impl PolicyStep {
    /// Whether another policy is to be loaded.
    pub fn loads(self) -> bool {
        matches!(self, Self::Load | Self::LoadBesideLocal)
    }
}

/// Decides it. `written` are the paths, relative to `/etc`, that the merge writes or removes, `conflicts` those whose
/// local version stays although the node image has another.
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

/// `selinux/TYPE/policy/policy.NN`, or the file that names TYPE.
fn is_policy(path: &[u8]) -> bool {
    let mut parts = path.split(|&byte| byte == b'/');
    match [parts.next(), parts.next(), parts.next(), parts.next(), parts.next()] {
        [Some(b"selinux"), Some(b"config"), None, ..] => true,
        [Some(b"selinux"), Some(_), Some(b"policy"), Some(file), None] => file.starts_with(b"policy."),
        _ => false,
    }
}

/// Gives the kernel the policy that is in `/etc`, if `step` says that it has another. Doing it again is harmless.
/// Returns what there is to be said: a line for the record.
///
/// # Errors
/// When the policy cannot be loaded and SELinux enforces: files with new labels are useless then. In permissive mode
/// that is the line.
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
            "the SELinux policy in /etc/selinux has local changes and stays, so types that only the node image's policy \
             has are unknown; run semodule --build",
        ),
        (_, PolicyStep::Load | PolicyStep::LoadBesideLocal) => match run(command, LOAD).await {
            Ok(_) if step == PolicyStep::LoadBesideLocal => warning(
                "the SELinux policy in /etc/selinux differs and was loaded, without the local changes that are in a \
                 policy file of another version; run semodule --build",
            ),
            Ok(_) => done("the SELinux policy in /etc/selinux differs and was loaded"),
            Err(error) if mode == Mode::Permissive => {
                warning(&format!("the new SELinux policy is not loaded (permissive): {error:#}"))
            }
            Err(error) => Err(error).context("the new SELinux policy cannot be loaded"),
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
    async fn what_is_said_and_what_fails() {
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
            (Permissive, Load, "false", Some((true, "is not loaded (permissive): false: exit status: 1"))),
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
        assert_eq!(error, "the new SELinux policy cannot be loaded");
    }

    #[test]
    fn when_it_is_loaded() {
        use PolicyStep::{Keep, KeptLocal, Load, LoadBesideLocal};
        let policy = "selinux/targeted/policy/policy.33";
        assert_eq!(step(&[], &[]), Keep);
        assert_eq!(step(&["selinux/targeted/contexts/files/file_contexts", "selinux", "selinux/x/policy"], &[]), Keep);
        assert_eq!(step(&["motd", policy], &[]), Load);
        assert_eq!(step(&["selinux/config"], &[]), Load);
        assert_eq!(step(&["selinux/config.old", "x/selinux/config", "selinux/config/x"], &[]), Keep);
        assert_eq!(step(&[], &["selinux/targeted/active/commit_num"]), Keep);
        assert_eq!(step(&[], &[policy]), KeptLocal);
        // Another version of the format beside the one that was changed.
        assert_eq!(step(&["selinux/targeted/policy/policy.34"], &[policy]), LoadBesideLocal);
        assert!(Load.loads() && LoadBesideLocal.loads() && !KeptLocal.loads() && !Keep.loads());
    }
}
