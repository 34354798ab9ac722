//! The space that the wanted objects take in the node store, known or estimated before they are fetched.
//!
//! A manifest has the compressed sizes of layers, and that bounds nothing from below: a layer is read past where the
//! booted system has its objects. A commit that lists the sizes of its objects (`ostree commit --generate-sizes`) says
//! what the wanted ones take: a pull that cannot fit is refused. For other commits an estimate is logged, and the pull
//! begins.
//!
//! Format source: libostree's `ostree.sizes` in a commit's metadata, `aay`: in each entry 32 bytes of checksum, two
//! varints (archived and unpacked size; seven bits a byte, lowest first) and, since libostree 2020.1, the
//! object's type.

use std::collections::HashSet;

use ostree::glib::{Variant, VariantDict, VariantTy};

use crate::image::{Failure, Kind};
use crate::store::{ObjectId, ObjectType};
use crate::{ProgressSnapshot, PullProgress};
use support::human_bytes;

use super::state::Import;

/// libostree's `OSTREE_OBJECT_TYPE_FILE`.
const FILE: u8 = 1;

/// The content object and its unpacked size in bytes; `None` for another type of object, or for what is no entry.
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

/// How many wanted objects the entries name, and their bytes; each object counts once.
fn at_least(entries: &[Vec<u8>], wanted: impl Fn(&ObjectId) -> bool) -> (u64, u64) {
    let mut seen = HashSet::new();
    let entries = entries.iter().filter_map(|bytes| entry(bytes));
    entries
        .filter(|(id, _)| wanted(id) && seen.insert(*id))
        .fold((0, 0_u64), |(count, sum), (_, size)| (count + 1, sum.saturating_add(size)))
}

/// `ostree.sizes` of a commit object; none where it says nothing.
fn sizes(commit: Vec<u8>) -> Option<Vec<Vec<u8>>> {
    let kind = VariantTy::new("(a{sv}aya(say)sstayay)").ok()?;
    let variant = Variant::from_data_with_type(commit, kind);
    VariantDict::new(Some(&variant.child_value(0))).lookup("ostree.sizes").ok().flatten()
}

/// Bytes that the wanted objects take in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// The commit lists the sizes.
    Listed(u64),
    /// The commit does not list them.
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

/// How many bytes of content a compressed byte of a node image's layer holds; measured with gzip.
const EXPANSION: u64 = 3;
/// Before so many bytes have been read, what was written of them says little about the rest.
const TELLING: u64 = 16 << 20;

/// What the layers that are still due bring: as much for each of their bytes as the layers before them did, and at
/// first as much as their share of wanted objects lets expect.
fn estimate(progress: &ProgressSnapshot, wanted: usize, target: usize) -> u64 {
    let due = u128::from(progress.bytes_total.saturating_sub(progress.bytes_fetched));
    let (written, read) = match progress.bytes_fetched {
        read if read >= TELLING => (u128::from(progress.bytes_written), u128::from(read)),
        _ => (u128::from(EXPANSION) * wanted as u128, target.max(1) as u128),
    };
    u64::try_from(due * written / read).unwrap_or(u64::MAX)
}

impl Import {
    /// How many objects are wanted and have not come, and what they take. Blocks.
    pub(super) fn need(&self) -> (u64, Need) {
        let commit = self.read_metadata(&self.commit, ObjectType::Commit).ok().flatten();
        let (wanted, target) = self.shares();
        match commit.and_then(sizes) {
            Some(sizes) => {
                let (count, bytes) = at_least(&sizes, |id| self.is_open(id));
                (count, Need::Listed(bytes))
            }
            None => (wanted as u64, Need::Estimated(estimate(&self.progress.snapshot(), wanted, target))),
        }
    }

    /// Refuses a pull whose wanted objects cannot fit the node store, and warns of one that may not fit it; to be called
    /// when the objects are known. Blocks.
    pub(super) fn check_room(&self, image: &str) -> Result<(), Failure> {
        let (count, need) = self.need();
        let (Need::Listed(bytes) | Need::Estimated(bytes)) = need;
        PullProgress::add(&self.progress.bytes_needed, bytes);
        let Ok((free, _)) = self.store.space() else { return Ok(()) };
        match need {
            Need::Listed(bytes) if bytes > free => {
                let what = format!("{image} has {count} objects that this machine lacks; none was fetched");
                Err(self.no_space(&what))
            }
            Need::Estimated(bytes) if bytes > free => {
                let place = self.store.repo_path().display();
                tracing::warn!(
                    "{count} objects of {image} are missing and may take {need}, but the node store {place} has only {} \
                     left",
                    human_bytes(free)
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A failure for lack of space, with what is needed and what is left.
    pub(super) fn no_space(&self, what: &str) -> Failure {
        const ON_DISK: &str = "free some space on that disk, or use a smaller node image";
        let (count, need) = self.need();
        let on_disk = self.store.is_on_disk();
        let reserve = if on_disk { ", of which 3 % are left to the system" } else { "" };
        let space = match self.store.space() {
            Ok((free, total)) => format!("{} MiB of {} MiB are free{reserve}", free >> 20, total >> 20),
            Err(_) => "its size is unknown".to_owned(),
        };
        let place = if on_disk { self.store.repo_path() } else { self.store.root() }.display();
        let message = format!(
            "{what}: no space left in the node store {place}: {space}, and {count} objects of {need} are still to come"
        );
        let failure = Failure::new(Kind::NoSpace, message);
        if on_disk { Failure { advice: ON_DISK, ..failure } } else { failure }
    }
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
    fn entries() {
        let id = |byte| ObjectId([byte; 32]);
        assert_eq!(entry(&bytes(1, &[5, 7])), Some((id(1), 7)), "before 2020.1");
        assert_eq!(entry(&bytes(1, &[5, 0xac, 0x02, FILE])), Some((id(1), 300)));
        assert_eq!(entry(&bytes(1, &[5, 7, 2])), None, "a dirtree");
        for wrong in [&[5][..], &[5, 0x80], &[0x80], &[], &[5, 7, 1, 1], &[0xff; 12]] {
            assert_eq!(entry(&bytes(1, wrong)), None, "{wrong:?}");
        }
        assert_eq!(entry(&[1; 31]), None);
        let listed = [bytes(1, &[0, 7, 1]), bytes(2, &[0, 9, 1]), bytes(1, &[0, 7, 1]), bytes(3, &[0, 1, 4])];
        assert_eq!(at_least(&listed, |_| true), (2, 16), "each once");
        assert_eq!(at_least(&listed, |wanted| *wanted == id(2)), (1, 9));
        assert_eq!(sizes(b"no commit".to_vec()), None);
    }

    #[test]
    fn estimates_follow_the_wanted_share_and_then_the_layers_that_were_read() {
        const MIB: u64 = 1 << 20;
        let progress = |total, fetched, written| ProgressSnapshot {
            bytes_total: total,
            bytes_fetched: fetched,
            bytes_written: written,
            ..ProgressSnapshot::default()
        };
        let table = [
            (progress(410 * MIB, 10 * MIB, 0), (1000, 1000), 1200 * MIB, "everything is wanted"),
            (progress(410 * MIB, 10 * MIB, 0), (250, 1000), 300 * MIB, "a quarter of the objects"),
            (progress(410 * MIB, 210 * MIB, 105 * MIB), (1000, 1000), 100 * MIB, "half of what was read was kept"),
            (progress(410 * MIB, 410 * MIB, 0), (7, 1000), 0, "nothing is due"),
            (progress(0, 0, 0), (0, 0), 0, "nothing is known"),
            (progress(u64::MAX, 0, 0), (1, 1), u64::MAX, "no overflow"),
        ];
        for (progress, (wanted, target), bytes, what) in table {
            assert_eq!(estimate(&progress, wanted, target), bytes, "{what}");
        }
    }

    proptest! {
        #[test]
        fn what_libostree_writes_is_read_and_nothing_panics(value: u64, junk: Vec<u8>) {
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
