//! Names of ostree objects: SHA-256 checksums, types, and paths in a repo.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use sha2::{Digest, Sha256};
use support::if_found;

/// The SHA-256 checksum that names an object. Stored as 32 bytes, so that a set of 30,000 takes one megabyte.
/// The default has only zeros, and stands for an unknown object.
#[derive(Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub [u8; 32]);

/// A set of object names.
pub type ObjectSet = HashSet<ObjectId>;

/// Error for a text that is not 64 lower-case hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("invalid object name {0:?}: expected 64 lower-case hexadecimal digits")]
pub struct BadObjectId(String);

impl ObjectId {
    /// Makes a name of the 32 bytes in GVariant metadata. Returns `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Parses the two parts of a loose object's path, `AA` and the rest. Returns `None` if they are invalid.
    pub fn from_parts(prefix: &[u8], rest: &[u8]) -> Option<Self> {
        if prefix.len() != 2 || rest.len() != 62 {
            return None;
        }
        let mut digits = [0; 64];
        digits[..2].copy_from_slice(prefix);
        digits[2..].copy_from_slice(rest);
        Self::from_hex(&digits)
    }

    fn from_hex(digits: &[u8]) -> Option<Self> {
        // Upper case is rejected: ostree never writes it, and each object must have one name.
        if digits.len() != 64 || digits.iter().any(u8::is_ascii_uppercase) {
            return None;
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).ok()?;
        Some(Self(bytes))
    }
}

impl FromStr for ObjectId {
    type Err = BadObjectId;

    fn from_str(text: &str) -> Result<Self, BadObjectId> {
        Self::from_hex(text.as_bytes()).ok_or_else(|| BadObjectId(text.chars().take(80).collect()))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

support::serialize_as_text!(ObjectId);

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The types of objects in a bare repo that images contain, a part of libostree's `OstreeObjectType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::EnumString)]
#[strum(serialize_all = "lowercase")]
pub enum ObjectType {
    /// A commit: metadata, root dirtree and root dirmeta.
    Commit,
    /// Detached metadata of a commit (signatures). Named after the commit, so its checksum differs from its name.
    CommitMeta,
    /// Names and checksums of one directory's entries.
    DirTree,
    /// Owner, mode and xattrs of a directory.
    DirMeta,
    /// A regular file or a symlink, with owner, mode and xattrs.
    File,
}

impl ObjectType {
    /// Returns the extension of the file name in a bare repo.
    pub fn extension(self) -> &'static str {
        self.into()
    }

    /// Parses an extension, the reverse of [`ObjectType::extension`].
    pub fn from_extension(extension: &[u8]) -> Option<Self> {
        std::str::from_utf8(extension).ok()?.parse().ok()
    }
}

/// Returns the path of a loose object, relative to the repo: `objects/AA/REST.TYPE`.
pub(super) fn loose_path(id: &ObjectId, kind: ObjectType) -> PathBuf {
    let digits = hex::encode(id.0);
    PathBuf::from(format!("objects/{}/{}.{}", &digits[..2], &digits[2..], kind.extension()))
}

/// Reads a metadata object of a repo. Returns `None` if it is missing, or if its checksum differs from its name: a power
/// cut can leave an empty or half-written file under the right name.
pub(super) fn read_metadata(repo: &Path, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
    let Some(bytes) = if_found(std::fs::read(repo.join(loose_path(id, kind))))? else { return Ok(None) };
    // Detached metadata are named after their commit.
    let is_whole = kind == ObjectType::CommitMeta || ObjectId(Sha256::digest(&bytes).into()) == *id;
    Ok(is_whole.then_some(bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_invalid_ones_are_rejected() {
        let text = "b8627e3ef0f255a322d2bd9610cfaaacc8f122b7f8d17c0e7e3caafa160f9fc7";
        let id: ObjectId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(ObjectId::from_parts(&text.as_bytes()[..2], &text.as_bytes()[2..]), Some(id));
        for bad in ["", "b8", &text[1..], &text.to_uppercase(), &format!("{text}0"), &text.replace('b', "g")] {
            assert!(bad.parse::<ObjectId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn damaged_metadata_count_as_missing() {
        let repo = tempfile::tempdir().unwrap();
        let id = ObjectId(Sha256::digest(b"metadata").into());
        for kind in [ObjectType::Commit, ObjectType::DirTree, ObjectType::DirMeta] {
            let path = repo.path().join(loose_path(&id, kind));
            assert_eq!(read_metadata(repo.path(), &id, kind).unwrap(), None, "missing");
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            for damaged in ["", "meta", "metadatA"] {
                std::fs::write(&path, damaged).unwrap();
                assert_eq!(read_metadata(repo.path(), &id, kind).unwrap(), None, "{damaged:?}");
            }
            std::fs::write(&path, "metadata").unwrap();
            assert_eq!(read_metadata(repo.path(), &id, kind).unwrap().unwrap(), b"metadata");
        }
    }

    #[test]
    fn paths_are_those_of_a_bare_repo() {
        let id = ObjectId([0xab; 32]);
        assert_eq!(
            loose_path(&id, ObjectType::DirTree),
            PathBuf::from(format!("objects/ab/{}.dirtree", "ab".repeat(31)))
        );
        for kind in
            [ObjectType::Commit, ObjectType::CommitMeta, ObjectType::DirTree, ObjectType::DirMeta, ObjectType::File]
        {
            assert_eq!(ObjectType::from_extension(kind.extension().as_bytes()), Some(kind));
        }
        assert_eq!(ObjectType::from_extension(b"filez"), None);
    }
}
