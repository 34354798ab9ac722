//! Whether what is wanted can fit at all, judged before it is fetched. Pure, but for [`Import::check_room`].
//!
//! A manifest has the compressed sizes of layers, and that bounds nothing from below: a layer is read past where the
//! booted system has its objects. What bounds it is a commit that says how large its objects are
//! (`ostree commit --generate-sizes`): the wanted ones take that much. A commit that does not say lets the pull
//! begin.
//!
//! Format source: libostree's `ostree.sizes` in a commit's metadata, `aay`: in each entry 32 bytes of checksum, two
//! varints (archived and unpacked size; seven bits a byte, lowest first) and, since libostree 2020.1, the
//! object's type.

use std::collections::HashSet;

use ostree::glib::{Variant, VariantDict, VariantTy};

use crate::image::Failure;
use crate::report::human_bytes;
use crate::store::{ObjectId, ObjectType};

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

impl Import {
    /// Refuses a pull whose wanted objects cannot fit the node store; to be called when they are known. Blocks.
    pub(super) fn check_room(&self, image: &str) -> Result<(), Failure> {
        let commit = self.read_metadata(&self.commit, ObjectType::Commit).map_err(|error| self.local(error))?;
        let Some(sizes) = commit.and_then(sizes) else { return Ok(()) };
        let (count, needed) = at_least(&sizes, |id| self.is_open(id));
        match self.store.space() {
            Ok((free, _)) if needed > free => {
                let what = format!(
                    "{image} has {count} objects of {} that this machine lacks; none was fetched, and the running \
                     system is untouched",
                    human_bytes(needed)
                );
                Err(self.no_space(&what))
            }
            _ => Ok(()),
        }
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
