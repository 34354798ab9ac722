//! Checks the free space for a merge.

use std::path::Path;

use anyhow::{Context, Result};

use super::plan::Plan;
use super::snapshot::{Content, Leaf};
use support::{BlockSize, human_bytes};

/// Bytes for a copy of the plan and the agent's record, and for each line of the journal.
const RECORD: u64 = 256 * 1024;
const LINE: u64 = 512;

/// The space and the number of files that a merge needs on one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    bytes: u64,
    files: u64,
}

/// Returns the needs on the file systems of `etc` and of the undo journal, by their units. They are upper bounds: each
/// file also counts with an entry.
fn needs(plan: &Plan, etc: BlockSize, journal: BlockSize) -> [Need; 2] {
    let whole = |unit: BlockSize, size: u64| unit.allocated(size).saturating_add(unit.allocated(1));
    let leaf = |unit: BlockSize, leaf: &Option<Leaf>| match leaf {
        Some(Leaf { content: Content::File { size, .. }, .. }) => whole(unit, *size),
        Some(_) => unit.allocated(1),
        None => 0,
    };
    let sum = |sizes: &mut dyn Iterator<Item = u64>| sizes.fold(0, u64::saturating_add);
    let (changes, aside) = (plan.changes.len() as u64, plan.aside.len() as u64);
    let written = sum(&mut plan.changes.iter().map(|change| leaf(etc, &change.after)));
    // Each saved version is a file, and may need its own directory.
    let copies = plan.aside.values().map(|size| whole(journal, *size).saturating_add(journal.allocated(1)));
    let saved = plan.changes.iter().map(|change| LINE.saturating_add(leaf(journal, &change.before)));
    let saved = sum(&mut copies.chain(saved).chain([RECORD]));
    [Need { bytes: written, files: changes + 1 }, Need { bytes: saved, files: changes + 2 * aside + 8 }]
}

/// Returns one line for each file system that lacks the space or the inodes to carry out `plan` and to undo it: that of
/// `etc` and that of the undo journal (below `run`).
///
/// # Errors
/// A file system does not report its space.
pub fn check_room(plan: &Plan, etc: &Path, run: &Path) -> Result<Vec<String>> {
    let unknown = |place: &Path| format!("cannot read the free space of {}", place.display());
    let unit = |place| BlockSize::at(place).with_context(|| unknown(place));
    let places = [etc, run].into_iter().zip(needs(plan, unit(etc)?, unit(run)?));
    let mut missing = Vec::new();
    for (place, Need { bytes, files }) in places {
        let stat = rustix::fs::statvfs(place).with_context(|| unknown(place))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Change, Meta, Origin};

    #[test]
    fn small_files_need_whole_pages_of_any_size() {
        let file =
            |size| Some(Leaf { meta: Meta::default(), content: Content::File { size, sha256: Default::default() } });
        let change = |before, after| Change { path: "a".into(), before, after, content: Origin::New, label: None };
        let plan = Plan {
            changes: vec![change(None, file(1)), change(file(1), file(5000)), change(file(1), None)],
            aside: [("b".into(), 1)].into(),
            ..Plan::default()
        };
        let [kib, lines] = [1 << 10, 3 * LINE + RECORD];
        for (page, all, etc, journal) in [(4, 24, 20, 28), (64, 320, 256, 448)] {
            let page = BlockSize::new(page * kib);
            assert_eq!(plan.bytes(page), all * kib, "without entries");
            let expected = [Need { bytes: etc * kib, files: 4 }, Need { bytes: journal * kib + lines, files: 13 }];
            assert_eq!(needs(&plan, page, page), expected);
        }
        let mixed = needs(&plan, BlockSize::new(4 * kib), BlockSize::new(64 * kib));
        assert_eq!((mixed[0].bytes, mixed[1].bytes), (20 * kib, 448 * kib + lines), "a disk and a tmpfs");
    }
}
