//! The trial run: runs programs of the new tree with the merged `/etc` before the switch.

use std::os::fd::BorrowedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::refusal::{Findings, Refusal};
use super::sshd;
use overlay_root::{DetachedTree, Trial};

/// The first command of the refresh: later programs may find their libraries only through its cache.
const CACHE: &[&str] = &["/usr/sbin/ldconfig", "-X"];

/// Programs of the new tree that must run.
const PROGRAMS: [&[&str]; 3] =
    [&["/usr/bin/true"], &["/usr/lib/systemd/systemd", "--version"], &["/usr/sbin/ldconfig", "-p"]];

/// A program that only a system with glibc has.
const OPTIONAL: &str = "/usr/sbin/ldconfig";

/// Suffix for the message of a program that needs a newer CPU.
const NEWER_CPU: &str = ": it is built for a newer CPU than this machine's";

/// Returns true if a program ended because the CPU is too old. glibc's loader reports a program or library that is marked
/// as such (`GNU_PROPERTY_X86_ISA_1_NEEDED`). Without the mark, a program ends at the first unknown instruction.
fn needs_newer_cpu(words: &str, signal: Option<i32>) -> bool {
    ["CPU ISA level is lower than required", "CPU does not support x86-64-v"].iter().any(|says| words.contains(says))
        || signal == Some(rustix::process::Signal::ILL.as_raw())
}

/// Time limit for one program of the trial run. Generous, because an emulated machine is slow.
const TIME: Duration = Duration::from_secs(60);

/// Runs programs of the new tree in a private mount namespace, with a copy of `/etc` to which `merge_etc` was applied. See
/// [`overlay_root::trial`].
///
/// # Errors
/// The private mount namespace cannot be made.
pub fn check_runs(
    tree: &DetachedTree,
    merge_etc: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync),
) -> Result<Findings> {
    let (mut report, new_sshd) = overlay_root::trial(tree, merge_etc, |trial| {
        let mut report = Findings::default();
        let has_ldconfig = Path::new(OPTIONAL).exists();
        match &trial.etc_unmerged {
            Some(why) => {
                report.warnings.push(format!(
                    "the trial run used the running /etc, not the merged one, and skipped ldconfig and `sshd -t`: {why}"
                ));
            }
            // A failure is only a warning, as in the refresh.
            None if has_ldconfig => {
                report.warnings.extend(try_program(trial, CACHE).map(|refusal| refusal.to_string()));
            }
            None => {}
        }
        let programs = PROGRAMS.iter().filter(|argv| argv[0] != OPTIONAL || has_ldconfig);
        report.refusals = programs.filter_map(|argv| try_program(trial, argv)).collect();
        // sshd cannot run if no program does, and its answer counts only for the merged /etc.
        let conclusive = report.refusals.is_empty() && trial.etc_unmerged.is_none();
        let new_sshd = conclusive.then(|| sshd::ask(trial, TIME)).flatten();
        (report, new_sshd)
    })?;
    if let Some(new_sshd) = new_sshd {
        sshd::compare(new_sshd, TIME, &mut report);
    }
    Ok(report)
}

fn try_program(trial: &Trial, argv: &[&str]) -> Option<Refusal> {
    match trial.run(argv, TIME) {
        Ok(ended) if ended.status.success() => None,
        Ok(ended) => {
            let words = ended.stderr.trim().lines().last().unwrap_or_default();
            let cpu = if needs_newer_cpu(words, ended.status.signal()) { NEWER_CPU } else { "" };
            Some(Refusal::Trial(format!("trial run of {}: {}: {words}{cpu}", argv.join(" "), ended.status)))
        }
        Err(error) => Some(Refusal::Trial(format!("{error:#}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_is_too_old_is_recognized() {
        assert!(needs_newer_cpu("/usr/bin/true: CPU ISA level is lower than required", None));
        assert!(needs_newer_cpu("Fatal glibc error: CPU does not support x86-64-v3", None));
        assert!(needs_newer_cpu("", Some(4)));
        assert!(!needs_newer_cpu("error while loading shared libraries: libc.so.6", None));
        assert!(!needs_newer_cpu("", Some(11)));
    }
}
