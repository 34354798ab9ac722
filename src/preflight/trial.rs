//! The trial run: programs of the new tree, with the merged `/etc`, before anybody depends on them.

use std::os::fd::BorrowedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::refusal::{Findings, Refusal};
use super::sshd;
use overlay_root::{DetachedTree, Trial};

/// What the refresh runs before everything else: later programs may find their libraries only by its cache.
const CACHE: &[&str] = &["/usr/sbin/ldconfig", "-X"];

/// Programs of the new tree that must run.
const PROGRAMS: [&[&str]; 3] =
    [&["/usr/bin/true"], &["/usr/lib/systemd/systemd", "--version"], &["/usr/sbin/ldconfig", "-p"]];

/// A system with another C library than glibc has no such program.
const OPTIONAL: &str = "/usr/sbin/ldconfig";

/// Said where it is known.
const NEWER_CPU: &str = ": it is built for a newer CPU than this machine's";

/// Whether a program ended because the CPU is too old: glibc's loader says so of what is marked as such
/// (`GNU_PROPERTY_X86_ISA_1_NEEDED`, also a C library's own), and what is not marked ends at the first instruction
/// that the CPU does not know.
fn needs_newer_cpu(words: &str, signal: Option<i32>) -> bool {
    ["CPU ISA level is lower than required", "CPU does not support x86-64-v"].iter().any(|says| words.contains(says))
        || signal == Some(rustix::process::Signal::ILL.as_raw())
}

/// How long a program of the trial run may take. Generous: an emulated machine is slow.
const TIME: Duration = Duration::from_secs(60);

/// Runs programs of the new tree in a private view of the machine, with an `/etc` to which `merge_etc` was
/// applied. See [`overlay_root::trial`].
///
/// # Errors
/// When the private view cannot be made.
pub fn check_runs(
    tree: &DetachedTree,
    merge_etc: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync),
) -> Result<Findings> {
    let (mut report, asked) = overlay_root::trial(tree, merge_etc, |trial| {
        let mut report = Findings::default();
        let has_ldconfig = Path::new(OPTIONAL).exists();
        match &trial.etc_unmerged {
            Some(why) => {
                report.warnings.push(format!(
                    "the trial run had the running /etc, not the merged one, so ldconfig and `sshd -t` were not tried: {why}"
                ));
            }
            // The refresh does not depend on its success either.
            None if has_ldconfig => {
                report.warnings.extend(try_program(trial, CACHE).map(|refusal| refusal.to_string()));
            }
            None => {}
        }
        let programs = PROGRAMS.iter().filter(|argv| argv[0] != OPTIONAL || has_ldconfig);
        report.refusals = programs.filter_map(|argv| try_program(trial, argv)).collect();
        // Where nothing runs, sshd does not either; and it is the merged /etc that it has to take.
        let judged = report.refusals.is_empty() && trial.etc_unmerged.is_none();
        let asked = judged.then(|| sshd::ask(trial, TIME)).flatten();
        (report, asked)
    })?;
    if let Some(asked) = asked {
        sshd::compare(asked, TIME, &mut report);
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
    fn what_an_old_cpu_looks_like() {
        assert!(needs_newer_cpu("/usr/bin/true: CPU ISA level is lower than required", None));
        assert!(needs_newer_cpu("Fatal glibc error: CPU does not support x86-64-v3", None));
        assert!(needs_newer_cpu("", Some(4)));
        assert!(!needs_newer_cpu("error while loading shared libraries: libc.so.6", None));
        assert!(!needs_newer_cpu("", Some(11)));
    }
}
