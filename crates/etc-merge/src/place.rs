//! One entry of `/etc`, reached safely, and the few things that are done to it.

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
use super::staging::{MOUNTED, Staging};
use support::failpoint::{self, Point};
use support::xattr::{self, LABEL};

/// A name in an open directory. The directory cannot be swapped under us any more.
pub(super) struct Place {
    pub(super) dir: OwnedFd,
    pub(super) name: Vec<u8>,
}

/// What an act came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was done. The label could not be set if `labelled` is false.
    Done { labelled: bool },
    /// It was not done, the entry is as it was, and this is why.
    Skipped(&'static str),
}

/// Content, label and time for an entry that is put in place.
#[derive(Default)]
pub(super) struct Source<'a> {
    /// The content of a regular file.
    pub content: Option<File>,
    pub label: Option<&'a [u8]>,
    /// Seconds and nanoseconds; now, if not given.
    pub mtime: Option<(i64, i64)>,
}

impl Place {
    /// Finds `path` below `root`. `None` when the directory it would be in is not there, is reached only
    /// through a link, or lies in another mount.
    pub fn find(root: BorrowedFd<'_>, path: &Bytes) -> Result<Option<Self>> {
        let (parent, name) = match path.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&path.0[..slash], &path.0[slash + 1..]),
            None => (&b"."[..], if path.0.is_empty() { b"." } else { &path.0[..] }),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat2(root, parent, flags, Mode::empty(), resolve()) {
            Ok(dir) => Ok(Some(Self { dir, name: name.to_vec() })),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
            Err(error) => Err(error).context("opening its directory"),
        }
    }

    /// What is there now.
    pub fn look(&self) -> Result<Option<Leaf>> {
        look(self.dir.as_fd(), &self.name).context("looking at it")
    }

    /// The label and the time of change of what is there now.
    pub fn label_and_mtime(&self) -> Result<(Option<Bytes>, (i64, i64))> {
        let xattrs = xattr::read(&proc_path(self.dir.as_fd(), &self.name)).context("reading its label")?;
        let stat = rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW).context("looking at it")?;
        Ok((xattrs.get(LABEL).cloned().map(Bytes), (stat.st_mtime, stat.st_mtime_nsec.cast_signed())))
    }

    /// Sets the label of what is there now.
    pub fn set_label(&self, label: &[u8]) -> Result<()> {
        failpoint::hit(Point::EtcMetadata, "").context("setting its label")?;
        xattr::set(&proc_path(self.dir.as_fd(), &self.name), LABEL, label).context("setting its label")
    }

    /// Opens a regular file.
    pub fn open(&self) -> Result<File> {
        open(self.dir.as_fd(), &self.name).context("opening it")
    }

    /// Removes a directory. One that is not empty stays.
    pub fn remove_directory(&self) -> Result<Outcome> {
        failpoint::hit(Point::EtcUnlink, "").context("removing it")?;
        match rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(Outcome::Done { labelled: true }),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(Outcome::Skipped("something new is in the directory")),
            Err(Errno::BUSY) => Ok(Outcome::Skipped(MOUNTED)),
            Err(error) => Err(error).context("removing it"),
        }
    }

    /// Removes `current`, which was seen there last.
    pub fn remove(&self, staging: &Staging, number: usize, current: &Leaf) -> Result<Outcome> {
        if current.is_directory() { self.remove_directory() } else { staging.take_out(number, self, current) }
    }

    /// Gives the directory there the owner, mode, attributes and label of `leaf`.
    pub fn dress(&self, leaf: &Leaf, source: &Source<'_>) -> Result<Outcome> {
        Ok(Outcome::Done { labelled: dress(self.dir.as_fd(), &self.name, leaf, source)? })
    }
}

/// Sets owner, mode, attributes, time and label; returns true if the label could be set.
pub(super) fn dress(dir: BorrowedFd<'_>, name: &[u8], leaf: &Leaf, source: &Source<'_>) -> Result<bool> {
    let step = || failpoint::hit(Point::EtcMetadata, "").context("setting owner, mode and attributes");
    let Meta { mode, uid, gid, xattrs } = &leaf.meta;
    let owner = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
    let is_link = matches!(leaf.content, Content::Symlink(_));
    step()?;
    // Owner first: a change of owner takes setuid bits and capabilities away.
    rustix::fs::chownat(dir, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).context("setting its owner")?;
    step()?;
    if !is_link {
        let kind = if leaf.is_directory() { OFlags::DIRECTORY } else { OFlags::empty() };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | kind;
        let fd = rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve()).context("opening it")?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(*mode)).context("setting its mode")?;
    }
    let path = proc_path(dir, name);
    step()?;
    // A default ACL of the directory has given it some already.
    for present in xattr::read(&path).context("reading its attributes")?.into_keys() {
        if present != LABEL && !xattrs.contains_key(&Bytes(present.clone())) {
            xattr::remove(&path, &present).with_context(|| format!("removing {}", Bytes(present)))?;
        }
    }
    for (attribute, value) in xattrs {
        xattr::set(&path, &attribute.0, &value.0).with_context(|| format!("setting {attribute}"))?;
    }
    let labelled = source.label.is_none_or(|label| xattr::set(&path, LABEL, label).is_ok());
    if let Some((tv_sec, tv_nsec)) = source.mtime {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).context("setting its time")?;
    }
    Ok(labelled)
}

/// Copies to the end and returns the SHA-256 of what was copied.
pub(super) fn copy(from: &mut File, to: &mut File) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = [0; 32 * 1024];
    loop {
        let length = from.read(&mut buffer).context("reading its content")?;
        if length == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..length]);
        failpoint::hit(Point::EtcContent, "").context("writing its content")?;
        to.write_all(&buffer[..length]).context("writing its content")?;
    }
}
