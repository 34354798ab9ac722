//! Computes or estimates the space that the wanted objects need in the node store, before they are fetched.
//!
//! A manifest has only the compressed sizes of layers. These are not a lower bound, because the booted system may have
//! the objects of a layer. A commit may list the sizes of its objects (`ostree commit --generate-sizes`): then a pull
//! that cannot fit is refused. For other commits, a warning is logged if the estimate does not fit, and the pull starts.
//!
//! Format source: libostree's `ostree.sizes` in the metadata of a commit, type `aay`. Each entry has 32 bytes of
//! checksum, two varints (archived and unpacked size; seven bits a byte, lowest first) and, since libostree 2020.1,
//! the type of the object.

use std::collections::HashSet;

use crate::ProgressSnapshot;
use crate::image::{Failure, Kind};
use crate::store::{ObjectId, commit_metadata};
use support::{BlockSize, human_bytes};

use super::state::Import;

/// libostree's `OSTREE_OBJECT_TYPE_FILE`.
const FILE: u8 = 1;

/// Parses an entry into a content object and its unpacked size in bytes. Returns `None` for other types of objects and
/// for malformed entries.
fn entry(bytes: &[u8]) -> Option<(ObjectId, u64)> {
    let (id, rest) = bytes.split_at_checked(32)?;
    let (_, rest) = varint(rest)?;
    let (unpacked, rest) = varint(rest)?;
    let is_file = matches!(rest, [] | [FILE]);
    Some((ObjectId::from_bytes(id)?, unpacked)).filter(|_| is_file)
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let end = bytes.iter().take(10).position(|byte| byte & 0x80 == 0)?;
    let value = bytes[..=end].iter().rev().fold(0_u64, |value, byte| value << 7 | u64::from(byte & 0x7f));
    Some((value, &bytes[end + 1..]))
}

/// Returns the number of wanted objects that the entries name, and the space that they need. Each object counts once.
fn at_least(entries: &[Vec<u8>], unit: BlockSize, wanted: impl Fn(&ObjectId) -> bool) -> (u64, u64) {
    let mut seen = HashSet::new();
    let entries = entries.iter().filter_map(|bytes| entry(bytes));
    entries
        .filter(|(id, _)| wanted(id) && seen.insert(*id))
        .fold((0, 0_u64), |(count, sum), (_, size)| (count + 1, sum.saturating_add(unit.allocated(size))))
}

/// Returns `ostree.sizes` of a commit object, or `None` if it has none.
fn sizes(commit: Vec<u8>) -> Option<Vec<Vec<u8>>> {
    commit_metadata(commit)?.lookup("ostree.sizes").ok().flatten()
}

/// Bytes that the wanted objects need in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Sum of the sizes that the commit lists, in whole units of the file system.
    Listed(u64),
    /// Estimate, because the commit does not list sizes.
    Estimated(u64),
}

impl std::fmt::Display for Need {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Need::Listed(bytes) => write!(out, "{}", human_bytes(*bytes)),
            Need::Estimated(bytes) => write!(out, "about {}", human_bytes(*bytes)),
        }
    }
}

/// Bytes of content for each compressed byte of a layer; measured for node images with gzip.
const EXPANSION: u64 = 3;
/// Compressed bytes that must have been read before the ratio of written to read bytes is used.
const MIN_SAMPLE: u64 = 16 << 20;

/// Estimates the bytes that the remaining layers add to the store. Extrapolates from the layers read so far, or, below
/// [`MIN_SAMPLE`] bytes, from the share of the objects that is wanted. The objects of a plain image are unknown: all are
/// assumed to be wanted. Each known object also needs a part of a unit.
fn estimate(progress: &ProgressSnapshot, unit: BlockSize, wanted: usize, target: usize) -> u64 {
    let due = u128::from(progress.bytes_total.saturating_sub(progress.bytes_fetched));
    let (written, read) = match progress.bytes_fetched {
        read if read >= MIN_SAMPLE => (u128::from(progress.bytes_written), u128::from(read)),
        _ if target == 0 => (u128::from(EXPANSION), 1),
        _ => (u128::from(EXPANSION) * wanted as u128, target as u128),
    };
    let content = u64::try_from(due * written / read).unwrap_or(u64::MAX);
    // Without a remaining layer, no object is stored.
    let slack = if due == 0 { 0 } else { unit.slack().saturating_mul(wanted as u64) };
    content.saturating_add(slack)
}

impl Import {
    /// Returns the number of objects that are still wanted and the space that they need. Blocks.
    pub(super) fn need(&self) -> (u64, Need) {
        let commit = self.base.commit_bytes(&mut |id, kind| self.read_metadata(id, kind));
        let (wanted, target) = self.open_and_total();
        let unit = self.store.block_size();
        match commit.and_then(sizes) {
            Some(sizes) => {
                let (count, bytes) = at_least(&sizes, unit, |id| self.is_open(id));
                (count, Need::Listed(bytes))
            }
            None => (wanted as u64, Need::Estimated(estimate(&self.progress.snapshot(), unit, wanted, target))),
        }
    }

    /// Refuses a pull whose wanted objects cannot fit into the node store, and warns if the estimate does not fit. The
    /// wanted set must be known. Blocks.
    pub(super) fn check_space(&self, image: &crate::image::PullSpec) -> Result<(), Failure> {
        let (count, need) = self.need();
        let (Need::Listed(bytes) | Need::Estimated(bytes)) = need;
        self.progress.update(|now| now.bytes_needed = now.bytes_needed.saturating_add(bytes));
        let Ok((free, _)) = self.store.space() else { return Ok(()) };
        match need {
            Need::Listed(bytes) if bytes > free => {
                let what =
                    format!("cannot pull the {count} objects of {image} that this machine lacks; none was fetched");
                Err(self.no_space(&what))
            }
            Need::Estimated(bytes) if bytes > free => {
                let place = self.store.repo_path().display();
                tracing::warn!(
                    "the missing objects of {image}{} may need {need}, but only {} are free in the node store {place}",
                    counted(" (", count, ")"),
                    human_bytes(free)
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Returns the failure for a lack of space. The message has the needed and the free space.
    pub(super) fn no_space(&self, what: &str) -> Failure {
        const ON_DISK: &str = "free some space on that disk, or use a smaller node image";
        let (count, need) = self.need();
        let on_disk = self.store.is_on_disk();
        let reserve = if on_disk { ", of which 3 % are reserved for the system" } else { "" };
        let space = match self.store.space() {
            Ok((free, total)) => format!("{} MiB of {} MiB are free{reserve}", free >> 20, total >> 20),
            Err(_) => "its size is unknown".to_owned(),
        };
        let place = if on_disk { self.store.repo_path() } else { self.store.root() }.display();
        let message = format!(
            "{what}: no space left in the node store {place}: {space}, and {}{need} are still to come",
            counted("", count, " objects of ")
        );
        let failure = Failure::new(Kind::NoSpace, message);
        if on_disk { Failure { advice: ON_DISK, ..failure } } else { failure }
    }
}

/// Returns the number of objects between two texts. The number is 0, and not shown, while the objects of a plain image
/// are unknown.
fn counted(before: &str, count: u64, after: &str) -> String {
    if count == 0 { String::new() } else { format!("{before}{count}{after}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(id: u8, sizes: &[u8]) -> Vec<u8> {
        [&[id; 32][..], sizes].concat()
    }

    #[test]
    fn entries_give_content_objects_and_sizes() {
        let id = |byte| ObjectId([byte; 32]);
        assert_eq!(entry(&bytes(1, &[5, 7])), Some((id(1), 7)), "without a type, as before libostree 2020.1");
        assert_eq!(entry(&bytes(1, &[5, 0xac, 0x02, FILE])), Some((id(1), 300)));
        assert_eq!(entry(&bytes(1, &[5, 7, 2])), None, "a dirtree");
        for wrong in [&[5][..], &[5, 0x80], &[0x80], &[], &[5, 7, 1, 1], &[0xff; 12]] {
            assert_eq!(entry(&bytes(1, wrong)), None, "{wrong:?}");
        }
        assert_eq!(entry(&[1; 31]), None);
        let listed = [bytes(1, &[0, 7, 1]), bytes(2, &[0, 9, 1]), bytes(1, &[0, 7, 1]), bytes(3, &[0, 1, 4])];
        let page = |kib: u64| BlockSize::new(kib << 10);
        assert_eq!(at_least(&listed, page(4), |_| true), (2, 8 << 10), "each object once");
        assert_eq!(at_least(&listed, page(64), |_| true), (2, 128 << 10), "whole pages");
        assert_eq!(at_least(&listed, page(4), |wanted| *wanted == id(2)), (1, 4 << 10));
        assert_eq!(sizes(b"not a commit".to_vec()), None);
    }

    #[test]
    fn estimates_use_the_wanted_share_then_the_measured_ratio() {
        const MIB: u64 = 1 << 20;
        let progress = |total, fetched, written| ProgressSnapshot {
            bytes_total: total,
            bytes_fetched: fetched,
            bytes_written: written,
            ..ProgressSnapshot::default()
        };
        let table = [
            (progress(410 * MIB, 10 * MIB, 0), (1000, 1000), 1200 * MIB, "all objects are wanted"),
            (progress(410 * MIB, 10 * MIB, 0), (250, 1000), 300 * MIB, "a quarter of the objects"),
            (progress(410 * MIB, 10 * MIB, 0), (0, 0), 1200 * MIB, "a plain image"),
            (progress(410 * MIB, 210 * MIB, 105 * MIB), (1000, 1000), 100 * MIB, "half of the bytes read were written"),
            (progress(410 * MIB, 410 * MIB, 0), (7, 1000), 0, "no layer remains"),
            (progress(0, 0, 0), (0, 0), 0, "progress is unknown"),
            (progress(u64::MAX, 0, 0), (1, 1), u64::MAX, "saturates"),
        ];
        for (progress, (wanted, target), bytes, what) in table {
            for page in [4 << 10, 64 << 10] {
                let slack = if progress.bytes_total == progress.bytes_fetched { 0 } else { wanted as u64 * page / 2 };
                let expected = bytes.saturating_add(slack);
                assert_eq!(estimate(&progress, BlockSize::new(page), wanted, target), expected, "{what}, {page}");
            }
        }
    }

    proptest! {
        #[test]
        fn varints_round_trip_and_junk_does_not_panic(value: u64, junk: Vec<u8>) {
            let mut written = Vec::new();
            let mut rest = value;
            while rest >= 0x80 {
                written.push((rest & 0x7f) as u8 | 0x80);
                rest >>= 7;
            }
            written.push(rest as u8);
            prop_assert_eq!(varint(&written), Some((value, &[][..])));
            let _ = entry(&junk);
            let _ = entry(&bytes(1, &junk));
            let length = junk.len();
            prop_assert!(sizes(junk).is_none_or(|sizes| sizes.len() <= length));
        }
    }
}
