//! A streaming reader of tar archives: headers, names, and content without copying.
//!
//! The `tar` crate parses single headers only, because this reader has special requirements: input is hostile (all
//! lengths are checked before an allocation), most content is skipped, and chunks arrive from another thread. Formats:
//! ustar, GNU (long names, base-256 numbers) and PAX (path, linkpath, size, uid, gid and xattrs). Sparse files: see
//! [`super::sparse`].

use std::collections::BTreeMap;
use std::io;

use tar::{EntryType, Header};

use super::sparse::{self, Declared, Map, Next};

/// Limit in bytes of the extended headers of one entry, and of the global headers of the archive.
const LARGEST_EXTENSION: u64 = 1 << 20;

/// Prefix of the PAX keys in which Go's and GNU's tar writers store extended attributes.
const PAX_XATTR: &[u8] = b"SCHILY.xattr.";

/// Error of reading an archive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The archive ends in a header or in content.
    #[error("the archive ends early")]
    Truncated,
    /// The archive is invalid or exceeds a limit.
    #[error("the archive is malformed: {0}")]
    Malformed(String),
    /// Reading or decompressing the archive failed.
    #[error("cannot read the archive: {0}")]
    Read(#[from] io::Error),
}

/// A source of the chunks of an archive.
pub(crate) trait Chunks {
    /// Returns the next chunk. An empty chunk is the end.
    fn next(&mut self) -> io::Result<Vec<u8>>;
}

impl<F: FnMut() -> io::Result<Vec<u8>> + ?Sized> Chunks for &mut F {
    fn next(&mut self) -> io::Result<Vec<u8>> {
        self()
    }
}

/// The metadata of an entry.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Path, byte for byte.
    pub path: Vec<u8>,
    /// Target of a hardlink or symlink, byte for byte.
    pub link: Vec<u8>,
    /// Type of the entry.
    pub kind: EntryType,
    /// Bytes of content, including holes.
    pub size: u64,
    /// Bytes in the holes of a sparse file: zeros that the archive does not store.
    pub holes: u64,
    /// Numeric id of the owner.
    pub uid: u32,
    /// Numeric id of the group.
    pub gid: u32,
    /// Mode bits of the header.
    pub mode: u32,
    /// Extended attributes from a PAX header (`SCHILY.xattr.NAME`), sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    /// Returns true if the entry is a regular file.
    pub(crate) fn is_regular(&self) -> bool {
        matches!(self.kind, EntryType::Regular | EntryType::Continuous)
    }
}

/// The next part of an entry's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// Stored bytes.
    Data(&'a [u8]),
    /// This number of zeros.
    Hole(u64),
}

impl From<String> for TarError {
    fn from(fault: String) -> Self {
        Self::Malformed(fault)
    }
}

/// Reads entries and their content in order.
pub(crate) struct TarStream<C> {
    chunks: C,
    current: Vec<u8>,
    at: usize,
    /// Unread bytes of the current entry's content.
    content: u64,
    /// Bytes of padding after the content.
    padding: u64,
    /// Map of the current entry if it is a sparse file.
    sparse: Option<Map>,
    /// Bytes of global headers so far, limited for the whole archive.
    globals: u64,
}

impl<C: Chunks> TarStream<C> {
    pub(crate) fn new(chunks: C) -> Self {
        Self { chunks, current: Vec::new(), at: 0, content: 0, padding: 0, sparse: None, globals: 0 }
    }

    /// Skips the rest of the current content and returns the next entry, or `None` at the end marker.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_content()?;
        let mut long_path = None;
        let mut long_link = None;
        let mut pax = Pax::default();
        let mut extended = 0;
        loop {
            let mut block = [0; 512];
            if !self.read_block(&mut block)? {
                return Ok(None);
            }
            if block.iter().all(|byte| *byte == 0) {
                // Two zero blocks end the archive, and all bytes after them are ignored. Some writers omit the second
                // block. Readers disagree about entries after a single zero block, so those are rejected.
                if self.read_block(&mut block)? && block.iter().any(|byte| *byte != 0) {
                    return Err(malformed("an entry follows half an end marker".into()));
                }
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check_sum(header, &block)?;
            let kind = header.entry_type();
            let number =
                |field: &str, value: io::Result<u64>| value.map_err(|_| malformed(format!("an invalid {field}")));
            let size = number("size", if blank(&header.as_old().size) { Ok(0) } else { header.entry_size() })?;
            let is_extension = matches!(kind, EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader);
            if is_extension {
                extended += size.min(LARGEST_EXTENSION + 1);
                if extended > LARGEST_EXTENSION {
                    return Err(malformed(format!("extended headers of more than {LARGEST_EXTENSION} bytes")));
                }
            }
            match kind {
                EntryType::GNULongName => long_path = Some(until_nul(self.extension(size)?)),
                EntryType::GNULongLink => long_link = Some(until_nul(self.extension(size)?)),
                EntryType::XHeader => pax.read(&self.extension(size)?)?,
                EntryType::XGlobalHeader => {
                    self.globals += size.min(LARGEST_EXTENSION + 1);
                    if self.globals > LARGEST_EXTENSION {
                        return Err(malformed("global headers of more than a mebibyte".into()));
                    }
                    self.extension(size)?;
                }
                _ => {
                    let old = header.as_old();
                    let uid = number("owner", if blank(&old.uid) { Ok(0) } else { header.uid() })?;
                    let gid = number("group", if blank(&old.gid) { Ok(0) } else { header.gid() })?;
                    let mode = number("mode", if blank(&old.mode) { Ok(0) } else { header.mode().map(u64::from) })?;
                    let mut entry = Entry {
                        path: long_path.unwrap_or_else(|| header.path_bytes().into_owned()),
                        link: long_link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
                        kind,
                        size,
                        holes: 0,
                        uid: narrow(uid)?,
                        gid: narrow(gid)?,
                        mode: narrow(mode)?,
                        xattrs: Vec::new(),
                    };
                    apply_pax(&mut entry, &pax)?;
                    // Only files have content. Some writers set the size of other entries, too.
                    let has_content = !matches!(
                        kind,
                        EntryType::Link
                            | EntryType::Symlink
                            | EntryType::Directory
                            | EntryType::Char
                            | EntryType::Block
                            | EntryType::Fifo
                    );
                    self.set_content(if has_content { entry.size } else { 0 })?;
                    self.set_sparse(&mut entry, header, &pax)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Returns the next piece of the current entry's content, or `None` at its end.
    pub(crate) fn content(&mut self) -> Result<Option<Piece<'_>>, TarError> {
        let most = match self.sparse.as_mut().map(Map::next) {
            None => u64::MAX,
            Some(Next::Data(most)) => most,
            Some(Next::Hole(count)) => return Ok(Some(Piece::Hole(count))),
            Some(Next::End) => return Ok(None),
        };
        let Some((start, end)) = self.stored(most)? else { return Ok(None) };
        if let Some(map) = &mut self.sparse {
            map.advance((end - start) as u64);
        }
        Ok(Some(Piece::Data(&self.current[start..end])))
    }

    /// Appends the rest of the current entry's content to `out`. The caller has checked its size.
    pub(crate) fn read_content(&mut self, out: &mut Vec<u8>) -> Result<(), TarError> {
        while let Some(piece) = self.content()? {
            match piece {
                Piece::Data(data) => out.extend_from_slice(data),
                Piece::Hole(count) => out.resize(out.len().saturating_add(narrow_length(count)?), 0),
            }
        }
        Ok(())
    }

    /// Moves behind the next stored bytes of the current entry, at most `most`. Returns their range in the current chunk,
    /// or `None` at the end of the content.
    fn stored(&mut self, most: u64) -> Result<Option<(usize, usize)>, TarError> {
        if self.content == 0 {
            return Ok(None);
        }
        self.fill()?;
        let most = usize::try_from(most.min(self.content)).unwrap_or(usize::MAX);
        let start = self.at;
        self.at += most.min(self.current.len() - self.at);
        self.content -= (self.at - start) as u64;
        Ok(Some((start, self.at)))
    }

    fn skip_content(&mut self) -> Result<(), TarError> {
        self.sparse = None;
        while self.stored(u64::MAX)?.is_some() {}
        self.content = std::mem::take(&mut self.padding);
        while self.stored(u64::MAX)?.is_some() {}
        Ok(())
    }

    /// Reads the map if the entry is a sparse file, and updates the entry's size.
    fn set_sparse(&mut self, entry: &mut Entry, header: &Header, pax: &Pax) -> Result<(), TarError> {
        let declared = sparse::pax(&pax.records, &pax.parts)?;
        let map = match (entry.kind, declared) {
            (EntryType::GNUSparse, None) => {
                let header = header.as_gnu().ok_or_else(|| malformed("a sparse file has no GNU header".into()))?;
                // The rest of the map is between the header and the content.
                let (content, padding) = (std::mem::take(&mut self.content), std::mem::take(&mut self.padding));
                let map = sparse::old_gnu(header, |block| match self.read_block(block)? {
                    true => Ok(()),
                    false => Err(TarError::Truncated),
                })?;
                (self.content, self.padding) = (content, padding);
                entry.kind = EntryType::Regular;
                map
            }
            (EntryType::Regular | EntryType::Continuous, Some(Declared::Map(map))) => map,
            (EntryType::Regular | EntryType::Continuous, Some(Declared::InContent(size))) => {
                sparse::in_content(size, |block| self.read_content_block(block))?
            }
            (_, None) => return Ok(()),
            (kind, Some(_)) => return Err(malformed(format!("a sparse entry has the type {kind:?}"))),
        };
        if map.stored() != self.content {
            let (map, content) = (map.stored(), self.content);
            return Err(malformed(format!("a sparse file has {content} bytes of content, but {map} in its map")));
        }
        entry.size = map.size();
        entry.holes = map.size() - map.stored();
        self.sparse = Some(map);
        Ok(())
    }

    fn read_content_block(&mut self, block: &mut [u8; 512]) -> Result<(), TarError> {
        let mut filled = 0;
        while filled < block.len() {
            let Some((start, end)) = self.stored((block.len() - filled) as u64)? else {
                return Err(malformed("a sparse file has a map without an end".into()));
            };
            block[filled..filled + end - start].copy_from_slice(&self.current[start..end]);
            filled += end - start;
        }
        Ok(())
    }

    fn set_content(&mut self, size: u64) -> Result<(), TarError> {
        // Any layer is smaller than 1 TiB. Near the largest number, the sum with the padding would overflow.
        if size > 1 << 40 {
            return Err(malformed(format!("an entry of {size} bytes")));
        }
        self.content = size;
        self.padding = size.next_multiple_of(512) - size;
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > LARGEST_EXTENSION {
            return Err(malformed(format!("an extended header of {size} bytes")));
        }
        self.set_content(size)?;
        let mut out = Vec::new();
        self.read_content(&mut out)?;
        self.skip_content()?;
        Ok(out)
    }

    /// Reads a block. Returns false if the archive ends before it: some writers omit the end marker.
    fn read_block(&mut self, block: &mut [u8; 512]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < block.len() {
            match self.fill() {
                Ok(()) => {}
                Err(TarError::Truncated) if filled == 0 => return Ok(false),
                Err(error) => return Err(error),
            }
            let length = (block.len() - filled).min(self.current.len() - self.at);
            block[filled..filled + length].copy_from_slice(&self.current[self.at..self.at + length]);
            self.at += length;
            filled += length;
        }
        Ok(true)
    }

    fn fill(&mut self) -> Result<(), TarError> {
        if self.at == self.current.len() {
            self.current = self.chunks.next()?;
            self.at = 0;
            if self.current.is_empty() {
                return Err(TarError::Truncated);
            }
        }
        Ok(())
    }
}

fn malformed(fault: String) -> TarError {
    TarError::Malformed(fault)
}

/// Returns true for a blank field. Some writers leave fields blank that an entry does not need.
fn blank(field: &[u8]) -> bool {
    field.iter().all(|byte| matches!(byte, 0 | b' '))
}

fn narrow(id: u64) -> Result<u32, TarError> {
    u32::try_from(id).map_err(|_| malformed(format!("an owner or group of {id}")))
}

fn narrow_length(count: u64) -> Result<usize, TarError> {
    usize::try_from(count).map_err(|_| malformed(format!("a hole of {count} bytes")))
}

fn until_nul(mut name: Vec<u8>) -> Vec<u8> {
    if let Some(end) = name.iter().position(|byte| *byte == 0) {
        name.truncate(end);
    }
    name
}

fn check_sum(header: &Header, block: &[u8; 512]) -> Result<(), TarError> {
    let expected = header.cksum().map_err(|_| malformed("a header without checksum".into()))?;
    let sum = |range: &[u8]| range.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    // The checksum field itself counts as eight spaces.
    let actual = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
    if actual == expected { Ok(()) } else { Err(malformed("a header with a wrong checksum".into())) }
}

/// The PAX records of one entry.
#[derive(Debug, Default)]
struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Values of the repeated keys `GNU.sparse.offset` and `GNU.sparse.numbytes`, alternating.
    parts: Vec<Vec<u8>>,
}

impl Pax {
    /// Parses records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
    fn read(&mut self, mut block: &[u8]) -> Result<(), TarError> {
        let bad = || malformed("an invalid PAX header".into());
        while !block.is_empty() {
            let space = block.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
            let length: usize =
                std::str::from_utf8(&block[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(bad)?;
            let record = block.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(bad)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], record[equals + 1..].to_vec());
            match key {
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    if (key == b"GNU.sparse.offset") != self.parts.len().is_multiple_of(2) {
                        return Err(malformed("a sparse file has an invalid map".into()));
                    }
                    self.parts.push(value);
                }
                _ => drop(self.records.insert(key.to_vec(), value)),
            }
            block = &block[length..];
        }
        Ok(())
    }
}

fn apply_pax(entry: &mut Entry, pax: &Pax) -> Result<(), TarError> {
    let number = |value: &[u8]| {
        let text = std::str::from_utf8(value).ok();
        text.and_then(|text| text.parse::<u64>().ok())
            .ok_or_else(|| malformed("an invalid number in a PAX header".into()))
    };
    for (key, value) in &pax.records {
        match key.as_slice() {
            b"path" => entry.path = value.clone(),
            b"linkpath" => entry.link = value.clone(),
            b"size" => entry.size = number(value)?,
            b"uid" => entry.uid = narrow(number(value)?)?,
            b"gid" => entry.gid = narrow(number(value)?)?,
            key if key.starts_with(PAX_XATTR) => {
                let name = &key[PAX_XATTR.len()..];
                if name.is_empty() || name.contains(&0) {
                    return Err(malformed("an extended attribute has an invalid name".into()));
                }
                entry.xattrs.push((name.to_vec(), value.clone()));
            }
            _ => {}
        }
    }
    // For a sparse file, `path` is a generated name for readers that do not support sparse files.
    if let Some(name) = pax.records.get(b"GNU.sparse.name".as_slice()) {
        entry.path = name.clone();
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
