//! A directory tree as plain data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::name::Bytes;

/// Type and content of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// A regular file.
    File {
        /// Size in bytes.
        size: u64,
        /// SHA-256 of the content, in hexadecimal.
        sha256: String,
    },
    /// A symbolic link, with its target.
    Symlink(Bytes),
    /// A directory, without its entries.
    Directory,
    /// A device, fifo or socket, a mount point, or an entry that cannot be read: the merge does not change it.
    Other,
}

/// Owner, mode and extended attributes, without the SELinux label.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits, including setuid, setgid and sticky; 0777 for a link.
    pub mode: u32,
    /// User ID of the owner.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Attribute values by name, including access control lists.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<Bytes, Bytes>,
}

/// An entry without the entries below it. The merge treats equal leaves as unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// Type and content.
    pub content: Content,
    /// Owner, mode and attributes.
    pub meta: Meta,
}

impl Leaf {
    /// Returns the mode with the file type bits, as in stat(2).
    pub fn raw_mode(&self) -> u32 {
        let kind = match self.content {
            Content::File { .. } | Content::Other => 0o100_000,
            Content::Symlink(_) => 0o120_000,
            Content::Directory => 0o040_000,
        };
        kind | self.meta.mode
    }

    /// Returns true for a directory.
    pub fn is_directory(&self) -> bool {
        self.content == Content::Directory
    }
}

/// A reason why the merge cannot change an entry, or cannot write an entry like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// The entry is immutable (`chattr +i`).
    Immutable,
    /// The entry is append-only (`chattr +a`).
    AppendOnly,
    /// Another process holds a lease on the file, so that it cannot be read.
    Lease,
    /// A directory of another file system without a mount, such as a btrfs subvolume.
    FileSystem,
    /// A directory below more than [`super::scan::MAX_DEPTH`] others.
    Depth,
    /// A default with an extended attribute that the file system of `/etc` cannot hold.
    Attribute,
}

impl Obstacle {
    /// Returns the reason as a phrase for users.
    pub fn reason(self) -> &'static str {
        match self {
            Obstacle::Immutable => "immutable (chattr +i)",
            Obstacle::AppendOnly => "append-only (chattr +a)",
            Obstacle::Lease => "under a lease of another process",
            Obstacle::FileSystem => "on another file system",
            Obstacle::Depth => "nested too deeply",
            Obstacle::Attribute => "has an extended attribute that the file system of /etc cannot hold",
        }
    }

    /// Returns the reason for the entries of such a directory.
    pub fn reason_inside(self) -> &'static str {
        match self {
            Obstacle::Immutable => "in an immutable directory (chattr +i)",
            Obstacle::AppendOnly => "in an append-only directory (chattr +a)",
            other => other.reason(),
        }
    }
}

/// An entry with everything below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The entry itself.
    pub leaf: Leaf,
    /// A reason why the merge cannot change it.
    pub obstacle: Option<Obstacle>,
    /// The entries of a directory by name; empty for other types.
    pub children: BTreeMap<Vec<u8>, Entry>,
}

impl Entry {
    /// Creates an entry without children or obstacle.
    pub fn new(content: Content, meta: Meta) -> Self {
        Self { leaf: Leaf { content, meta }, obstacle: None, children: BTreeMap::new() }
    }
}

/// A directory tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The root directory.
    pub root: Entry,
}
