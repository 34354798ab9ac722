//! Checks of the free space for a merge.

use std::path::Path;

use anyhow::{Context, Result};

use super::plan::Plan;
use super::snapshot::{Content, Leaf};
use support::human_bytes;

/// Returns a line for each file system, of `etc` and of the undo record (below `run`), that lacks the space to carry
/// out `plan` and to take it back. An upper bound: every file counts as whole pages.
///
/// # Errors
/// When a file system does not report its space.
pub fn check_room(plan: &Plan, etc: &Path, run: &Path) -> Result<Vec<String>> {
    const PAGE: u64 = 4096;
    // The plan once more, a line of the journal for each act, and the agent's own record.
    const RECORD: u64 = 256 * 1024;
    const LINE: u64 = 512;
    let whole = |size: u64| size.next_multiple_of(PAGE) + PAGE;
    let pages = |leaf: &Option<Leaf>| match leaf {
        Some(Leaf { content: Content::File { size, .. }, .. }) => whole(*size),
        Some(_) => PAGE,
        None => 0,
    };
    let changes = plan.changes.len() as u64;
    // A file and, at worst, a directory of its own.
    let aside = plan.aside.values().map(|size| whole(*size) + PAGE).sum::<u64>();
    let saved = plan.changes.iter().map(|change| LINE + pages(&change.before)).sum::<u64>();
    let needs = [
        (etc, plan.changes.iter().map(|change| pages(&change.after)).sum::<u64>(), changes + 1),
        (run, RECORD + saved + aside, changes + 2 * plan.aside.len() as u64 + 8),
    ];
    let mut missing = Vec::new();
    for (place, bytes, files) in needs {
        let stat =
            rustix::fs::statvfs(place).with_context(|| format!("cannot tell the room on {}", place.display()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        // Without a limit, a file system counts no blocks or no inodes at all.
        if stat.f_blocks > 0 && free < bytes {
            missing.push(format!(
                "the switch needs up to {} on the file system of {}, which has {} free; make room there",
                human_bytes(bytes),
                place.display(),
                human_bytes(free)
            ));
        }
        if stat.f_files > 0 && stat.f_favail < files {
            missing.push(format!(
                "the switch makes up to {files} files on the file system of {}, which has room for {}; make room there",
                place.display(),
                stat.f_favail
            ));
        }
    }
    Ok(missing)
}
