//! Entries of a tree, as an archive and a directory hold them.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// The entries of a tree by path, without a leading slash. Directories come before their entries.
pub type Tree<'a> = BTreeMap<String, Node<'a>>;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node<'a> {
    /// A directory.
    Directory { mode: u32 },
    /// A regular file.
    File { mode: u32, content: Cow<'a, [u8]> },
    /// A symbolic link.
    Link(String),
}

impl<'a> Node<'a> {
    /// A file that all users may read.
    pub fn text(content: impl Into<Cow<'a, str>>) -> Self {
        let content = match content.into() {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        };
        Self::File { mode: 0o644, content }
    }

    /// A file that only root may read.
    pub fn secret(content: &'a [u8]) -> Self {
        Self::File { mode: 0o600, content: content.into() }
    }

    /// A program.
    pub fn program(content: &'a [u8]) -> Self {
        Self::File { mode: 0o755, content: content.into() }
    }
}

/// Adds the directories of all entries. The kernel does not create them when it unpacks an archive.
pub fn with_parents(mut tree: Tree<'_>) -> Tree<'_> {
    let paths: Vec<_> = tree.keys().cloned().collect();
    for path in paths {
        for (end, _) in path.match_indices('/') {
            tree.entry(path[..end].to_owned()).or_insert(Node::Directory { mode: 0o755 });
        }
    }
    tree
}
