//! The finished delta directory: its figures, and lookups of paths that differ from the booted `/usr`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{Base, DetachedTree};
use support::human_bytes;

/// Figures of a delta. A symbolic link counts as a file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeltaCounts {
    /// Files that the booted tree lacks.
    pub added: u64,
    /// Files that replace an entry of the booted tree.
    pub changed: u64,
    /// Files of the booted tree that are hidden.
    pub removed: u64,
    /// Directories in the delta.
    pub directories: u64,
    /// Size of the added files, in bytes.
    pub added_bytes: u64,
    /// Size of the changed files in the node image, in bytes.
    pub changed_bytes: u64,
    /// Size in the booted tree of the entries that the changed files replace, in bytes.
    pub replaced_bytes: u64,
    /// Size of the removed files, in bytes.
    pub removed_bytes: u64,
    /// Added and changed files that were copied, because the node store does not hold them.
    pub copied: u64,
    /// Size of the copied files, in bytes. The other files are hard links and need no space.
    pub copied_bytes: u64,
}

impl DeltaCounts {
    /// Describes the cost of a complete tree in a line.
    pub fn cost(&self) -> String {
        let files = self.added + self.changed;
        let Self { directories, copied, copied_bytes, .. } = self;
        let bytes = human_bytes(*copied_bytes);
        format!(
            "/usr: the tree needs {bytes} and {} inodes: {copied} of {files} files are copies, {directories} directories",
            copied + directories
        )
    }
}

/// A delta directory on disk. It must not change once it is part of an overlay.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Path of the directory.
    pub directory: PathBuf,
    /// Figures of the delta.
    pub counts: DeltaCounts,
    /// Parts of the target that the delta omits, one line each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The way in which it becomes the new `/usr`.
    #[serde(default)]
    pub base: Base,
    /// Figures of the complete tree of a [`Base::Bound`]. It is beside the directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete: Option<DeltaCounts>,
}

impl Delta {
    /// Builds the new `/usr` as a detached tree named `source`. See [`crate::open_new_usr`].
    pub fn open_usr(&self, source: &str) -> Result<DetachedTree> {
        crate::open_new_usr(&self.directory, &self.base, source)
    }

    /// Opens the directory for many calls of [`DeltaLookup::contains`], each of which needs one system call.
    pub fn lookup(&self) -> Result<DeltaLookup> {
        let directory = File::open(&self.directory)
            .with_context(|| format!("cannot open the delta directory {}", self.directory.display()))?;
        Ok(DeltaLookup { directory })
    }
}

/// An open [`Delta`].
#[derive(Debug)]
pub struct DeltaLookup {
    directory: File,
}

impl DeltaLookup {
    /// Returns true if `path`, relative to `/usr`, differs from the booted `/usr`: it is added, changed or removed. A
    /// directory differs if an entry below it does.
    pub fn contains(&self, path: &Path) -> rustix::io::Result<bool> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() {
            return Ok(true);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Links are not followed: a path through a changed link differs.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(self.directory.as_fd(), path, flags, Mode::empty(), resolve) {
            Ok(_) => Ok(true),
            // A parent is a file, a whiteout or a link in the delta. A link as the last component does not give this error,
            // because the flags contain PATH and NOFOLLOW.
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
