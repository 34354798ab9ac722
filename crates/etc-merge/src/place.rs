//! One entry of `/etc`, reached through an open directory, and the operations on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::name::Bytes;
use super::scan::{look, open, proc_path, resolve};
use super::snapshot::{Content, Leaf, Meta};
use support::failpoint::{self, Point};
use support::xattr::{self, LABEL};

pub(super) const MOUNTED: &str = "a file system is mounted there";

/// A name in an open directory. Another process cannot replace the directory meanwhile.
pub(super) struct Place {
    pub(super) dir: OwnedFd,
    pub(super) name: Vec<u8>,
}

/// Result of a change to one entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The change was made; `labelled` is false if the label could not be set.
    Done { labelled: bool },
    /// The entry was not changed, for this reason.
    Skipped(&'static str),
}

/// Content, label and time of a new version.
#[derive(Default)]
pub(super) struct Source<'a> {
    /// The content of a regular file.
    pub content: Option<File>,
    /// The SELinux label; `None` keeps the default of the file system.
    pub label: Option<&'a [u8]>,
    /// Seconds and nanoseconds; `None` keeps the current time.
    pub mtime: Option<(i64, i64)>,
}

impl Place {
    /// Finds `path` below `root`. Returns `None` if the parent directory is missing, is behind a symbolic link, or is
    /// in another mount.
    pub fn find(root: BorrowedFd<'_>, path: &Bytes) -> Result<Option<Self>> {
        let (parent, name) = match path.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path.0[..slash], &path.0[slash + 1..]),
            None => (&b"."[..], if path.0.is_empty() { b"." } else { &path.0[..] }),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat2(root, parent, flags, Mode::empty(), resolve()) {
            Ok(dir) => Ok(Some(Self { dir, name: name.to_vec() })),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
            Err(error) => Err(error).context("cannot open its directory"),
        }
    }

    /// Reads the current entry; `None` if the name does not exist.
    pub fn look(&self) -> Result<Option<Leaf>> {
        look(self.dir.as_fd(), &self.name).context("cannot read it")
    }

    /// Returns the label and the modification time of the current entry.
    pub fn label_and_mtime(&self) -> Result<(Option<Bytes>, (i64, i64))> {
        let xattrs = xattr::read(&proc_path(self.dir.as_fd(), &self.name)).context("cannot read its label")?;
        let stat = rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW).context("cannot read it")?;
        // Nanoseconds are unsigned on some architectures.
        Ok((xattrs.get(LABEL).cloned().map(Bytes), (stat.st_mtime, stat.st_mtime_nsec as i64)))
    }

    /// Sets the label of the current entry.
    pub fn set_label(&self, label: &[u8]) -> Result<()> {
        failpoint::hit(Point::EtcMetadata, "").context("cannot set its label")?;
        xattr::set(&proc_path(self.dir.as_fd(), &self.name), LABEL, label).context("cannot set its label")
    }

    /// Opens a regular file.
    pub fn open(&self) -> Result<File> {
        open(self.dir.as_fd(), &self.name).context("cannot open it")
    }

    /// Removes the directory if it is empty.
    pub fn remove_directory(&self) -> Result<Outcome> {
        failpoint::hit(Point::EtcUnlink, "").context("cannot remove it")?;
        match rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(Outcome::Done { labelled: true }),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(Outcome::Skipped("the directory has a new entry")),
            Err(Errno::BUSY) => Ok(Outcome::Skipped(MOUNTED)),
            Err(error) => Err(error).context("cannot remove it"),
        }
    }

    /// Sets the owner, mode, attributes and label of an existing directory to those of `leaf`.
    pub fn set_metadata(&self, leaf: &Leaf, source: &Source<'_>) -> Result<Outcome> {
        Ok(Outcome::Done { labelled: set_metadata(self.dir.as_fd(), &self.name, leaf, source)? })
    }
}

/// Sets owner, mode, attributes, label and time. Returns true if the label could be set. Removes attributes that `leaf`
/// does not have.
pub(super) fn set_metadata(dir: BorrowedFd<'_>, name: &[u8], leaf: &Leaf, source: &Source<'_>) -> Result<bool> {
    let step = || failpoint::hit(Point::EtcMetadata, "").context("cannot set its owner, mode and attributes");
    let Meta { mode, uid, gid, xattrs } = &leaf.meta;
    let owner = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
    let is_link = matches!(leaf.content, Content::Symlink(_));
    step()?;
    // The owner comes first, because the kernel clears setuid bits and capabilities when it changes.
    rustix::fs::chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).context("cannot set its owner")?;
    step()?;
    if !is_link {
        let kind = if leaf.is_directory() { OFlags::DIRECTORY } else { OFlags::empty() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | kind;
        let fd = rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve()).context("cannot open it")?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(*mode)).context("cannot set its mode")?;
    }
    let path = proc_path(dir, name);
    step()?;
    // The entry has inherited attributes if its directory has a default ACL.
    for present in xattr::read(&path).context("cannot read its attributes")?.into_keys() {
        if present != LABEL && !xattrs.contains_key(&Bytes(present.clone())) {
            xattr::remove(&path, &present)
                .with_context(|| format!("cannot remove its attribute {}", Bytes(present)))?;
        }
    }
    for (attribute, value) in xattrs {
        xattr::set(&path, &attribute.0, &value.0).with_context(|| format!("cannot set its attribute {attribute}"))?;
    }
    let labelled = source.label.is_none_or(|label| xattr::set(&path, LABEL, label).is_ok());
    if let Some((tv_sec, tv_nsec)) = source.mtime {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).context("cannot set its time")?;
    }
    Ok(labelled)
}

/// Copies the rest of `from` and returns the SHA-256 of the copied bytes, in hexadecimal.
pub(super) fn copy(from: &mut File, to: &mut File) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = [0; 32 * 1024];
    loop {
        let length = from.read(&mut buffer).context("cannot read its content")?;
        if length == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..length]);
        failpoint::hit(Point::EtcContent, "").context("cannot write its content")?;
        to.write_all(&buffer[..length]).context("cannot write its content")?;
    }
}
