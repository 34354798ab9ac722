//! Sparse files in tar archives: maps of the stored parts of a file and of its holes. Pure.
//!
//! Format source: the GNU tar manual, "Sparse Formats". There are four: GNU's old format (type `S`, the map is in the
//! header and in the blocks after it), PAX 0.0 and 0.1 (the map is in PAX records), and PAX 1.0 (the map is at the
//! beginning of the content). GNU tar, libarchive and Go write and read them.

use std::collections::{BTreeMap, VecDeque};

use tar::{GnuExtSparseHeader, GnuHeader, GnuSparseHeader};

/// Limit of the parts of one file. A map of this size needs 2 MiB.
const MOST_SPANS: usize = 128 * 1024;

/// A sparse file according to a PAX header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Declared {
    /// The map of the formats 0.0 and 0.1.
    Map(Map),
    /// The map is at the beginning of the content (format 1.0). Holds the file's size in bytes.
    InContent(u64),
}

/// The fault of a map, for a message.
pub(super) type Fault = String;

/// A part of the file that the archive stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    offset: u64,
    length: u64,
}

/// The parts of one file that are not read yet, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    spans: VecDeque<Span>,
    at: u64,
    size: u64,
}

/// The next part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// This number of zeros, which the archive does not store.
    Hole(u64),
    /// At most this number of stored bytes. The caller passes the number that it read to [`Map::advance`].
    Data(u64),
    /// The end of the file.
    End,
}

impl Map {
    /// Makes a map of `(offset, length)` pairs for a file of `size` bytes.
    ///
    /// # Errors
    /// The parts are not in order, overlap, or end after the file.
    fn new(pairs: impl IntoIterator<Item = (u64, u64)>, size: u64) -> Result<Self, Fault> {
        let mut map = Self { spans: VecDeque::new(), at: 0, size };
        let mut end = 0;
        for (offset, length) in pairs {
            let next = offset.checked_add(length).filter(|next| *next <= size && offset >= end);
            let Some(next) = next else {
                return Err(format!("a sparse file of {size} bytes has {length} bytes at {offset}, after {end}"));
            };
            end = next;
            // GNU tar marks a hole at the end with an empty part.
            if length > 0 {
                if map.spans.len() == MOST_SPANS {
                    return Err(too_many_parts());
                }
                map.spans.push_back(Span { offset, length });
            }
        }
        Ok(map)
    }

    /// Returns the file's size in bytes, including holes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of bytes that the archive stores.
    pub(super) fn stored(&self) -> u64 {
        self.spans.iter().map(|span| span.length).sum()
    }

    /// Returns the next part. A hole is then behind the position.
    pub(super) fn next(&mut self) -> Next {
        let to = self.spans.front().map_or(self.size, |span| span.offset);
        if to > self.at {
            let hole = to - self.at;
            self.at = to;
            return Next::Hole(hole);
        }
        self.spans.front().map_or(Next::End, |span| Next::Data(span.length))
    }

    /// Moves the position by the stored bytes that were read, at most the number in [`Next::Data`].
    pub(super) fn advance(&mut self, count: u64) {
        self.at += count;
        if let Some(span) = self.spans.front_mut() {
            span.offset += count;
            span.length = span.length.saturating_sub(count);
            if span.length == 0 {
                self.spans.pop_front();
            }
        }
    }
}

/// Reads the map of a header of type `S`. `block` reads the blocks after the header.
pub(super) fn old_gnu<E: From<Fault>>(
    header: &GnuHeader,
    mut block: impl FnMut(&mut [u8; 512]) -> Result<(), E>,
) -> Result<Map, E> {
    let unreadable = |_| E::from(invalid("map"));
    let mut pairs = Vec::new();
    let mut add = |some: &[GnuSparseHeader]| -> Result<(), E> {
        for part in some.iter().take_while(|part| !part.is_empty()) {
            pairs.push((part.offset().map_err(unreadable)?, part.length().map_err(unreadable)?));
        }
        if pairs.len() > MOST_SPANS {
            return Err(E::from(too_many_parts()));
        }
        Ok(())
    };
    add(&header.sparse)?;
    let mut more = header.is_extended();
    // Blocks without parts are rejected, so that the limit of parts also limits the blocks.
    while more {
        let mut extension = GnuExtSparseHeader::new();
        block(extension.as_mut_bytes())?;
        if extension.sparse()[0].is_empty() {
            return Err(E::from("a sparse file has an empty block in its map".to_owned()));
        }
        add(extension.sparse())?;
        more = extension.is_extended();
    }
    Map::new(pairs, header.real_size().map_err(unreadable)?).map_err(E::from)
}

/// Parses the PAX records of a sparse file. Returns `None` if there are none. `parts` are the values of the repeated keys
/// `GNU.sparse.offset` and `GNU.sparse.numbytes`, alternating.
pub(super) fn pax(records: &BTreeMap<Vec<u8>, Vec<u8>>, parts: &[Vec<u8>]) -> Result<Option<Declared>, Fault> {
    let field = |name: &str| records.get(format!("GNU.sparse.{name}").as_bytes());
    let size = |name: &str| field(name).and_then(|value| number(value)).ok_or_else(|| invalid(name));
    let version = |name: &str| field(name).map(|value| String::from_utf8_lossy(value).into_owned());
    match (version("major").as_deref(), version("minor").as_deref()) {
        (Some("1"), Some("0")) => return size("realsize").map(|size| Some(Declared::InContent(size))),
        (None, None) | (Some("0"), _) => {}
        (major, minor) => {
            return Err(format!(
                "a sparse file has the unknown format {}.{}",
                major.unwrap_or("?"),
                minor.unwrap_or("?")
            ));
        }
    }
    let numbers: Option<Vec<u64>> = match field("map") {
        Some(map) => map.split(|byte| *byte == b',').filter(|part| !part.is_empty()).map(number).collect(),
        None if parts.is_empty() && field("size").is_none() => return Ok(None),
        None => parts.iter().map(|part| number(part)).collect(),
    };
    let numbers = numbers.filter(|numbers| numbers.len() % 2 == 0).ok_or_else(|| invalid("map"))?;
    let declared = field("numblocks").map(|value| number(value));
    if declared.is_some_and(|declared| declared != Some(numbers.len() as u64 / 2)) {
        return Err(invalid("numblocks"));
    }
    let pairs = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    Map::new(pairs, size("size")?).map(|map| Some(Declared::Map(map)))
}

/// Reads the map at the beginning of the content (format 1.0) of a file of `size` bytes. It consists of decimal numbers,
/// one per line: the number of parts, then offset and length of each. Zeros fill the last block.
pub(super) fn in_content<E: From<Fault>>(
    size: u64,
    mut block: impl FnMut(&mut [u8; 512]) -> Result<(), E>,
) -> Result<Map, E> {
    let mut numbers = Vec::new();
    let (mut line, mut wanted) = (Vec::new(), None);
    loop {
        let mut buffer = [0; 512];
        block(&mut buffer)?;
        for byte in buffer {
            match byte {
                b'\n' => {
                    let value = number(&line).ok_or_else(|| E::from(invalid("map")))?;
                    line.clear();
                    match wanted {
                        None if value > MOST_SPANS as u64 => {
                            return Err(E::from(too_many_parts()));
                        }
                        None => wanted = Some(value as usize * 2),
                        Some(_) => numbers.push(value),
                    }
                    if wanted == Some(numbers.len()) {
                        let pairs = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1]));
                        return Map::new(pairs, size).map_err(E::from);
                    }
                }
                digit if line.len() < 20 => line.push(digit),
                _ => return Err(E::from(invalid("map"))),
            }
        }
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    text.parse().ok()
}

fn invalid(field: &str) -> Fault {
    format!("a sparse file has an invalid {field}")
}

fn too_many_parts() -> Fault {
    format!("a sparse file has more than {MOST_SPANS} parts")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(mut map: Map, most: u64) -> (u64, u64) {
        let (mut holes, mut data) = (0, 0);
        loop {
            match map.next() {
                Next::Hole(count) => holes += count,
                Next::Data(count) => {
                    data += count.min(most);
                    map.advance(count.min(most));
                }
                Next::End => return (holes, data),
            }
        }
    }

    fn records(pairs: &[(&str, &str)]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        pairs.iter().map(|(key, value)| (format!("GNU.sparse.{key}").into_bytes(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn only_ordered_parts_inside_the_file_are_a_map() {
        for (pairs, size, expected) in [
            (&[][..], 0, Some((0, 0))),
            (&[], 9, Some((9, 0))),
            (&[(0, 9)], 9, Some((0, 9))),
            (&[(2, 3), (5, 1), (8, 0)], 8, Some((4, 4))),
            (&[(2, 3), (4, 1)], 8, None),
            (&[(5, 1), (2, 1)], 8, None),
            (&[(2, 7)], 8, None),
            (&[(2, u64::MAX)], 8, None),
            (&[(9, 0)], 8, None),
        ] {
            let map = Map::new(pairs.iter().copied(), size);
            assert_eq!(map.clone().ok().map(|map| read(map, 2)), expected, "{pairs:?} {size}");
            if let (Ok(map), Some((_, stored))) = (map, expected) {
                assert_eq!((map.stored(), map.size()), (stored, size));
            }
        }
        assert!(Map::new((0..=MOST_SPANS as u64).map(|at| (2 * at, 1)), u64::MAX).is_err());
    }

    #[test]
    fn pax_records_of_three_formats_are_parsed() {
        let map = |pairs: &[(u64, u64)], size| Ok(Some(Declared::Map(Map::new(pairs.iter().copied(), size).unwrap())));
        let parts = |parts: &[&str]| parts.iter().map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>();
        assert_eq!(pax(&records(&[]), &[]), Ok(None));
        assert_eq!(pax(&records(&[("name", "x")]), &[]), Ok(None), "a name without a map is not sparse");
        let old = records(&[("size", "9"), ("numblocks", "2")]);
        assert_eq!(pax(&old, &parts(&["1", "2", "9", "0"])), map(&[(1, 2)], 9));
        let middle = records(&[("size", "9"), ("numblocks", "1"), ("map", "1,2")]);
        assert_eq!(pax(&middle, &[]), map(&[(1, 2)], 9));
        let new = records(&[("major", "1"), ("minor", "0"), ("realsize", "7")]);
        assert_eq!(pax(&new, &[]), Ok(Some(Declared::InContent(7))));
        for bad in [
            &[("major", "1"), ("minor", "0")][..],
            &[("major", "1"), ("minor", "1"), ("realsize", "7")],
            &[("major", "2"), ("minor", "0"), ("realsize", "7")],
            &[("map", "1,2")],
            &[("size", "9"), ("map", "1")],
            &[("size", "9"), ("map", "1,-2")],
            &[("size", "9"), ("map", "1,+2")],
            &[("size", "9"), ("map", "1,2"), ("numblocks", "2")],
            &[("size", "99999999999999999999"), ("map", "1,2")],
        ] {
            assert!(pax(&records(bad), &[]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn maps_at_the_beginning_of_the_content_are_parsed() {
        let blocks = |text: &str| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            let mut at = 0;
            in_content(10_000, move |block: &mut [u8; 512]| -> Result<(), Fault> {
                block.copy_from_slice(bytes.get(at..at + 512).ok_or("ends")?);
                at += 512;
                Ok(())
            })
        };
        assert_eq!(blocks("0\n").map(|map| read(map, 9)), Ok((10_000, 0)));
        assert_eq!(blocks("2\n0\n512\n10000\n0\n").map(|map| read(map, 9)), Ok((9_488, 512)));
        let many: String = (0..300).map(|at| format!("{}\n1\n", at * 10)).collect();
        assert_eq!(blocks(&format!("300\n{many}")).map(|map| read(map, 9)), Ok((9_700, 300)));
        for bad in ["", "x\n", "\n", "1\n0\n", "99999999999\n", "1\n0\n20000\n", &"7".repeat(600)] {
            assert!(blocks(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn holes_and_data_add_up_to_the_size(pairs in prop::collection::vec((0_u64..100, 0_u64..100), 0..20), size in 0_u64..3000, most in 1_u64..50) {
            if let Ok(map) = Map::new(pairs, size) {
                let stored = map.stored();
                prop_assert_eq!(read(map, most), (size - stored, stored));
            }
        }
    }
}
