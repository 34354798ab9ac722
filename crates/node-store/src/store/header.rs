//! The header that a content object's checksum covers before the content: owner, mode, symlink target and extended
//! attributes, serialised as the GVariant `(uuuusa(ayay))` in libostree's framing.
//!
//! Format source: libostree's `ostree-core.c` (file header). Written without glib, because it runs once per object on every
//! thread.

use sha2::{Digest, Sha256};

use super::framing::{array, elements, members, tuple};

/// Extended attributes as images store them: a serialised `a(ayay)`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Xattrs {
    raw: Vec<u8>,
    pairs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Xattrs {
    /// Parses a serialised `a(ayay)`. Returns `None` if it is not in normal form, or if a name is empty or not a C string.
    pub fn parse(raw: &[u8]) -> Option<Self> {
        let pairs = parse_pairs(raw)?;
        let named = |(name, _): &(Vec<u8>, Vec<u8>)| {
            name.len() > 1 && name.iter().position(|b| *b == 0) == Some(name.len() - 1)
        };
        // A second serialisation of the same set would be a second checksum for the same file.
        (pairs.iter().all(named) && serialise_pairs(&pairs) == raw).then(|| Self { raw: raw.to_owned(), pairs })
    }

    /// Serialises names (without the final NUL) and values, sorted by name as libostree sorts them.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let with_nul = |name: &[u8]| name.iter().copied().chain([0]).collect::<Vec<u8>>();
        let mut pairs: Vec<_> = pairs.into_iter().map(|(name, value)| (with_nul(name), value.to_vec())).collect();
        pairs.sort();
        Self { raw: serialise_pairs(&pairs), pairs }
    }

    /// Iterates over names (without the final NUL) and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pairs.iter().map(|(name, value)| (&name[..name.len() - 1], value.as_slice()))
    }

    /// Returns true if the attribute is within Linux's limits (XATTR_NAME_MAX, XATTR_SIZE_MAX).
    pub fn can_be_set(name: &[u8], value: &[u8]) -> bool {
        name.len() <= 255 && value.len() <= 65_536
    }

    /// Returns the serialised form. Its SHA-256 is its name in an image.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

/// Metadata of a regular file or symlink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMeta {
    /// Numeric id of the owner.
    pub uid: u32,
    /// Numeric id of the group.
    pub gid: u32,
    /// Permission bits (07777). The file type follows from `target`. Ignored for symlinks.
    pub mode: u32,
    /// Target of a symlink, byte for byte, or `None` for a regular file.
    pub target: Option<Vec<u8>>,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl FileMeta {
    /// Returns a hasher that has read the framed header. The caller adds the content; a symlink has none.
    pub fn hasher(&self) -> Sha256 {
        let mut hasher = Sha256::new();
        hasher.update(self.frame());
        hasher
    }

    /// Returns the framed header: length as a big-endian `u32`, four zero bytes, the GVariant.
    pub fn frame(&self) -> Vec<u8> {
        const S_IFREG: u32 = 0o100_000;
        const S_IFLNK_0777: u32 = 0o120_777;
        let mode = if self.target.is_some() { S_IFLNK_0777 } else { S_IFREG | (self.mode & 0o7777) };
        let target = self.target.as_deref().unwrap_or_default();
        let numbers = [self.uid, self.gid, mode, 0].map(u32::to_be_bytes);
        let variant = tuple(&[&[numbers.as_flattened(), target, &[0]].concat(), self.xattrs.as_bytes()]);
        [&(variant.len() as u32).to_be_bytes(), &[0; 4], variant.as_slice()].concat()
    }
}

fn serialise_pairs(pairs: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    array(pairs.iter().map(|(name, value)| tuple(&[name, value])))
}

fn parse_pairs(raw: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let pair = |element: Option<&[u8]>| {
        let [name, value] = members(element?)?;
        Some((name.to_vec(), value.to_vec()))
    };
    elements(raw)?.map(pair).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use ostree::glib::{self, prelude::*};
    use proptest::prelude::*;

    fn glib_frame(meta: &FileMeta) -> Vec<u8> {
        let xattrs: Vec<(Vec<u8>, Vec<u8>)> = meta.xattrs.pairs.clone();
        let mode = if meta.target.is_some() { 0o120_777 } else { 0o100_000 | meta.mode };
        let target = String::from_utf8(meta.target.clone().unwrap_or_default()).unwrap();
        let variant = (meta.uid.to_be(), meta.gid.to_be(), mode.to_be(), 0_u32, target, xattrs).to_variant();
        let data = variant.data_as_bytes();
        let mut framed = (data.len() as u32).to_be_bytes().to_vec();
        framed.extend([0; 4]);
        framed.extend_from_slice(&data);
        framed
    }

    fn libostree_checksum(meta: &FileMeta, content: &[u8]) -> Vec<u8> {
        use ostree::gio;
        let info = gio::FileInfo::new();
        info.set_attribute_uint32("unix::uid", meta.uid);
        info.set_attribute_uint32("unix::gid", meta.gid);
        match &meta.target {
            None => {
                info.set_attribute_uint32("unix::mode", 0o100_000 | meta.mode);
                info.set_file_type(gio::FileType::Regular);
                info.set_size(content.len() as i64);
            }
            Some(target) => {
                info.set_attribute_uint32("unix::mode", 0o120_777);
                info.set_file_type(gio::FileType::SymbolicLink);
                info.set_symlink_target(std::str::from_utf8(target).unwrap());
            }
        }
        let xattrs = meta.xattrs.pairs.clone().to_variant();
        let stream = gio::MemoryInputStream::from_bytes(&glib::Bytes::from(content));
        let sum = ostree::checksum_file_from_input(
            &info,
            Some(&xattrs),
            Some(&stream),
            ostree::ObjectType::File,
            gio::Cancellable::NONE,
        )
        .unwrap();
        hex::decode(sum.to_hex()).unwrap()
    }

    fn metas() -> impl Strategy<Value = FileMeta> {
        let pairs =
            prop::collection::btree_map("[a-z]{1,9}\\.[a-z]{1,300}", prop::collection::vec(any::<u8>(), 0..400), 0..5);
        (any::<u32>(), any::<u32>(), 0_u32..0o10000, proptest::option::of("[a-z/.]{1,300}"), pairs).prop_map(
            |(uid, gid, mode, target, pairs)| FileMeta {
                uid,
                gid,
                mode,
                target: target.map(String::into_bytes),
                xattrs: Xattrs::from_pairs(pairs.iter().map(|(name, value)| (name.as_bytes(), value.as_slice()))),
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn same_bytes_as_glib_and_same_checksum_as_libostree(meta in metas(), content in prop::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(meta.frame(), glib_frame(&meta));
            let mut hasher = meta.hasher();
            if meta.target.is_none() {
                hasher.update(&content);
            }
            prop_assert_eq!(hasher.finalize().to_vec(), libostree_checksum(&meta, &content));
            prop_assert_eq!(Xattrs::parse(meta.xattrs.as_bytes()), Some(meta.xattrs.clone()));
        }

        #[test]
        fn any_bytes_parse_to_normal_form_or_not_at_all(raw in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(xattrs) = Xattrs::parse(&raw) {
                prop_assert_eq!(xattrs.as_bytes(), raw.as_slice());
            }
        }
    }

    #[test]
    fn large_xattrs_change_the_offset_width() {
        for size in [200, 240, 250, 255, 256, 65_000, 65_530, 65_536, 70_000] {
            let value = vec![7; size];
            let xattrs = Xattrs::from_pairs([(b"user.a".as_slice(), value.as_slice())]);
            let meta = FileMeta { uid: 0, gid: 1, mode: 0o644, target: None, xattrs };
            assert_eq!(meta.frame(), glib_frame(&meta), "{size}");
            assert!(Xattrs::parse(meta.xattrs.as_bytes()).is_some(), "{size}");
        }
    }
}
