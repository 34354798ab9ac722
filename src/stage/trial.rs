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
const PROGRAMS: [&[&str]; 4] =
    [CACHE, &["/usr/bin/true"], &["/usr/lib/systemd/systemd", "--version"], &["/usr/sbin/ldconfig", "-p"]];

/// A system with another C library than glibc has no such program.
const OPTIONAL: &str = "/usr/sbin/ldconfig";

/// How long a program of the trial run may take. Generous: an emulated machine is slow.
const TIME: Duration = Duration::from_secs(60);

/// How the trial went.
#[derive(Debug, Default)]
pub struct TrialReport {
    /// Programs that did not run.
    pub refusals: Vec<Refusal>,
    /// Why the programs saw the running `/etc` and not the merged one, if so.
    pub warning: Option<String>,
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
        for argv in PROGRAMS {
            let absent = argv[0] == OPTIONAL && !Path::new(OPTIONAL).exists();
            // The running /etc is not ours to write.
            if absent || (argv == CACHE && trial.etc_unmerged.is_some()) {
                continue;
            }
            if let Some(refusal) = try_program(trial, argv) {
                report.refusals.push(refusal);
            }
        }
        report.warning = trial
            .etc_unmerged
            .as_ref()
            .map(|why| format!("the trial run had the running /etc, not the merged one: {why}"));
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
