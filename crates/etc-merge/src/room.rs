//! Checks the free space for a merge.

use std::path::Path;

use anyhow::{Context, Result};

use super::plan::Plan;
use super::snapshot::{Content, Leaf};
use support::human_bytes;

/// Returns one line for each file system that lacks the space or the inodes to carry out `plan` and to undo it: that of
/// `etc` and that of the undo journal (below `run`). The need is an upper bound; every file counts as whole pages.
///
/// # Errors
/// A file system does not report its space.
pub fn check_room(plan: &Plan, etc: &Path, run: &Path) -> Result<Vec<String>> {
    const PAGE: u64 = 4096;
    // Bytes for a copy of the plan and the agent's record, and for each line of the journal.
    const RECORD: u64 = 256 * 1024;
    const LINE: u64 = 512;
    let whole = |size: u64| size.next_multiple_of(PAGE) + PAGE;
    let pages = |leaf: &Option<Leaf>| match leaf {
        Some(Leaf { content: Content::File { size, .. }, .. }) => whole(*size),
        Some(_) => PAGE,
        None => 0,
    };
    let changes = plan.changes.len() as u64;
    // Each saved version is a file, and may need its own directory.
    let aside = plan.aside.values().map(|size| whole(*size) + PAGE).sum::<u64>();
    let saved = plan.changes.iter().map(|change| LINE + pages(&change.before)).sum::<u64>();
    let needs = [
        (etc, plan.changes.iter().map(|change| pages(&change.after)).sum::<u64>(), changes + 1),
        (run, RECORD + saved + aside, changes + 2 * plan.aside.len() as u64 + 8),
    ];
    let mut missing = Vec::new();
    for (place, bytes, files) in needs {
        let stat =
            rustix::fs::statvfs(place).with_context(|| format!("cannot read the free space of {}", place.display()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        // A file system without a limit reports zero blocks or zero inodes.
        if stat.f_blocks > 0 && free < bytes {
            missing.push(format!(
                "the switch needs up to {} on the file system of {}, which has {} free; free space there",
                human_bytes(bytes),
                place.display(),
                human_bytes(free)
            ));
        }
        if stat.f_files > 0 && stat.f_favail < files {
            missing.push(format!(
                "the switch creates up to {files} files on the file system of {}, which has {} free inodes; remove files there",
                place.display(),
                stat.f_favail
            ));
        }
    }
    Ok(missing)
}
