//! The delta directory: what it holds, and whether a path differs from the booted one.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// How much a delta changes. A symbolic link is a file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeltaCounts {
    /// Files that the booted tree lacks.
    pub added: u64,
    /// Files that replace something of the booted tree.
    pub changed: u64,
    /// Files of the booted tree that are hidden.
    pub removed: u64,
    /// Directories in the delta.
    pub directories: u64,
    /// Size of the added files, in bytes.
    pub added_bytes: u64,
    /// Size of the changed files, in bytes, as they are in the node image.
    pub changed_bytes: u64,
    /// What the changed files, and whatever else they take the place of, had in the booted tree, in bytes.
    pub replaced_bytes: u64,
    /// Size of the removed files, in bytes.
    pub removed_bytes: u64,
    /// Of these, how many files had to be copied because the node store does not hold them.
    pub copied: u64,
    /// Their size in bytes: what the delta costs beyond the store.
    pub copied_bytes: u64,
}

/// A delta directory on disk. It must not change once it is part of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Where it is.
    pub directory: PathBuf,
    /// What it changes.
    pub counts: DeltaCounts,
    /// What of the target it does not show, one line each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl Delta {
    /// Whether `path`, relative to `/usr`, differs from the booted `/usr`: it is new, changed, or gone.
    /// A directory differs when something in it does. Costs one system call after opening the delta.
    ///
    /// # Errors
    /// When the delta directory cannot be read.
    pub fn contains(&self, path: &Path) -> Result<bool> {
        Ok(self.lookup()?.contains(path)?)
    }

    /// For many questions in a row.
    pub fn lookup(&self) -> Result<DeltaLookup> {
        let directory = File::open(&self.directory)
            .with_context(|| format!("opening the delta directory {}", self.directory.display()))?;
        Ok(DeltaLookup { directory })
    }
}

/// An open [`Delta`].
#[derive(Debug)]
pub struct DeltaLookup {
    directory: File,
}

impl DeltaLookup {
    /// See [`Delta::contains`].
    pub fn contains(&self, path: &Path) -> rustix::io::Result<bool> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() {
            return Ok(true);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Links are not followed, the delta's own included: a path through a changed link differs.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(self.directory.as_fd(), path, flags, Mode::empty(), resolve) {
            Ok(_) => Ok(true),
            // Above it is a file, a whiteout or a link of the delta. (A link as the last component
            // cannot be opened under NO_SYMLINKS without PATH and NOFOLLOW both, which we give.)
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
