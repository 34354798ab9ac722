//! The trial run: programs of the new tree, with the merged `/etc`, before anybody depends on them.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::preflight::Refusal;
use crate::mount::{self, DetachedTree, Trial};

/// What the refresh runs before everything else: later programs may find their libraries only by its cache.
const CACHE: &[&str] = &["/usr/sbin/ldconfig", "-X"];

/// Programs of the new tree that must run.
const PROGRAMS: [&[&str]; 3] =
    [&["/usr/bin/true"], &["/usr/lib/systemd/systemd", "--version"], &["/usr/sbin/ldconfig", "-p"]];

/// A system with another C library than glibc has no such program.
const OPTIONAL: &str = "/usr/sbin/ldconfig";

/// How long a program of the trial run may take. Generous: an emulated machine is slow.
const TIME: Duration = Duration::from_secs(60);

/// How the trial went.
#[derive(Debug, Default)]
pub struct TrialReport {
    /// Programs that did not run.
    pub refusals: Vec<Refusal>,
    /// What is no reason to refuse, a line each.
    pub warnings: Vec<String>,
}

/// Runs programs of the new tree in a private view of the machine, with an `/etc` to which `merge_etc` was
/// applied. See [`mount::trial`].
///
/// # Errors
/// When the private view cannot be made.
pub fn check_runs(
    tree: &DetachedTree,
    merge_etc: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync),
) -> Result<TrialReport> {
    mount::trial(tree, merge_etc, |trial| {
        let mut report = TrialReport::default();
        let has_ldconfig = Path::new(OPTIONAL).exists();
        match &trial.etc_unmerged {
            Some(why) => {
                report.warnings.push(format!("the trial run had the running /etc, not the merged one: {why}"));
            }
            // The refresh does not depend on its success either.
            None if has_ldconfig => {
                report.warnings.extend(try_program(trial, CACHE).map(|refusal| refusal.to_string()));
            }
            None => {}
        }
        let programs = PROGRAMS.iter().filter(|argv| argv[0] != OPTIONAL || has_ldconfig);
        report.refusals = programs.filter_map(|argv| try_program(trial, argv)).collect();
        report
    })
}

fn try_program(trial: &Trial, argv: &[&str]) -> Option<Refusal> {
    match trial.run(argv, TIME) {
        Ok(ended) if ended.status.success() => None,
        Ok(ended) => {
            let words = ended.stderr.trim().lines().last().unwrap_or_default().to_owned();
            Some(Refusal::Trial(format!("trial run of {}: {}: {words}", argv.join(" "), ended.status)))
        }
        Err(error) => Some(Refusal::Trial(format!("{error:#}"))),
    }
}
