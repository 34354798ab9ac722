//! An `/etc` as plain data.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::name::Bytes;

/// What kind of thing an entry is, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// A regular file.
    File {
        /// In bytes.
        size: u64,
        /// SHA-256 of the content, in hexadecimal.
        sha256: String,
    },
    /// A symbolic link and where it points.
    Symlink(Bytes),
    /// A directory. Its entries are not part of this.
    Directory,
    /// A device, fifo or socket, a mount point, or an entry that cannot be read: the merge does not change it.
    Other,
}

/// Owner, mode and extended attributes, without the security label.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits; always 0777 for a link.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Name to value; access control lists are among them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<Bytes, Bytes>,
}

/// Everything about one entry that makes it equal to another, or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// Kind and content.
    pub content: Content,
    /// The rest.
    pub meta: Meta,
}

impl Leaf {
    /// Mode with the file type, as stat(2) gives it.
    pub fn raw_mode(&self) -> u32 {
        let kind = match self.content {
            Content::File { .. } | Content::Other => 0o100_000,
            Content::Symlink(_) => 0o120_000,
            Content::Directory => 0o040_000,
        };
        kind | self.meta.mode
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.content == Content::Directory
    }
}

/// A reason why the merge cannot change an entry, or cannot write one like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// `chattr +i`.
    Immutable,
    /// `chattr +a`.
    AppendOnly,
    /// Another process holds a lease on the file, so that it cannot be read.
    Lease,
    /// A directory of another file system without a mount, such as a btrfs subvolume.
    FileSystem,
    /// A directory below more than [`super::scan::DEEPEST`] others.
    Depth,
    /// A default with an extended attribute that the file system of `/etc` cannot hold.
    Attribute,
}

impl Obstacle {
    /// The reason in a few words.
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

    /// The reason for an entry of the directory.
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
    /// What a directory holds; empty for everything else.
    pub children: BTreeMap<Vec<u8>, Entry>,
}

impl Entry {
    /// An entry without anything below it.
    pub fn new(content: Content, meta: Meta) -> Self {
        Self { leaf: Leaf { content, meta }, obstacle: None, children: BTreeMap::new() }
    }
}

/// A whole `/etc`: its root directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The root, a directory.
    pub root: Entry,
}

impl Snapshot {
    /// How many entries there are, without the root.
    pub fn len(&self) -> usize {
        fn below(entry: &Entry) -> usize {
            entry.children.values().map(|child| 1 + below(child)).sum()
        }
        below(&self.root)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.root.children.is_empty()
    }
}

impl fmt::Display for Content {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::File { size, .. } => write!(out, "file of {size} bytes"),
            Content::Symlink(target) => write!(out, "link to {target}"),
            Content::Directory => out.write_str("directory"),
            Content::Other => out.write_str("special file or mount point"),
        }
    }
}
