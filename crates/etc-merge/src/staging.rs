//! The staging directory in `/etc`, which holds new versions until they are on the disk.
//!
//! A rename can reach the disk before the content of the renamed file, and a power cut in between leaves an empty file.
//! The merge and its undo therefore create all new versions in this directory, sync the file system once, rename the
//! versions to their final names, and sync again. On a file system in memory, a sync returns at once.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::place::{MOUNTED, Outcome, Place, Source, copy, set_metadata};
use super::scan::{STAGING, look, resolve};
use super::snapshot::{Content, Leaf};
use support::failpoint::{self, Point};

/// The open staging directory. The name of a version in it is the number of its change in the plan.
pub(super) struct Staging {
    etc: OwnedFd,
    dir: OwnedFd,
}

impl Staging {
    /// Creates the directory in `etc`, or empties the one that a killed call or a power cut left.
    pub fn open(etc: BorrowedFd<'_>) -> Result<Self> {
        let opening = || format!("cannot create the staging directory /etc/{}", String::from_utf8_lossy(STAGING));
        failpoint::hit(Point::EtcStaging, "").with_context(opening)?;
        match rustix::fs::mkdirat(etc, STAGING, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            other => other.with_context(opening)?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat2(etc, STAGING, flags, Mode::empty(), resolve()).with_context(opening)?;
        let staging = Self { etc: rustix::io::dup(etc).with_context(opening)?, dir };
        staging.clear()?;
        Ok(staging)
    }

    /// Returns true if the directory exists: an earlier call was killed.
    pub fn is_left(etc: BorrowedFd<'_>) -> bool {
        rustix::fs::statat(etc, STAGING, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Removes the directory with its content, and syncs the file system of `/etc`.
    pub fn close(self) -> Result<()> {
        failpoint::hit(Point::EtcStaging, "").context("cannot remove the staging directory")?;
        self.clear()?;
        rustix::fs::unlinkat(&self.etc, STAGING, AtFlags::REMOVEDIR).context("cannot remove the staging directory")?;
        self.sync()
    }

    fn clear(&self) -> Result<()> {
        let clearing = "cannot empty the staging directory";
        for entry in Dir::read_from(&self.dir).context(clearing)? {
            let entry = entry.context(clearing)?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                self.discard(entry.file_name().to_bytes()).context(clearing)?;
            }
        }
        Ok(())
    }

    fn discard(&self, name: &[u8]) -> Result<(), Errno> {
        match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => rustix::fs::unlinkat(&self.dir, name, AtFlags::REMOVEDIR),
            other => other,
        }
    }

    /// Syncs the file system of `/etc`.
    pub fn sync(&self) -> Result<()> {
        sync(self.etc.as_fd()).context("cannot sync the file system of /etc")
    }

    /// Creates version `number` from `leaf` and `source`, with owner, mode, attributes and label. Returns true if the
    /// label could be set.
    pub fn make(&self, number: usize, leaf: &Leaf, source: &mut Source<'_>) -> Result<bool> {
        failpoint::hit(Point::EtcMake, "").context("cannot create the new version")?;
        let name = name(number);
        match &leaf.content {
            Content::File { sha256, .. } => {
                let mut content =
                    source.content.take().context("bug: the new version has no source for its content")?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&self.dir, &name, flags, Mode::RUSR | Mode::WUSR)
                    .context("cannot create the new version")?;
                let written = copy(&mut content, &mut File::from(file))?;
                ensure!(written == *sha256, "its content differs from the plan; make a new plan");
            }
            Content::Symlink(target) => {
                rustix::fs::symlinkat(&target.0, &self.dir, &name).context("cannot create the new version")?;
            }
            Content::Directory => {
                rustix::fs::mkdirat(&self.dir, &name, Mode::RWXU).context("cannot create the new version")?;
            }
            Content::Other => bail!("bug: the plan creates a special file"),
        }
        set_metadata(self.dir.as_fd(), &name, leaf, source)
    }

    /// Renames version `number` to `place`, if the entry there is still `current`. Keeps a change that another process
    /// makes at the same moment. If `current` is a directory, the name does not exist for a moment.
    pub fn put(&self, number: usize, place: &Place, current: Option<&Leaf>) -> Result<Outcome> {
        match current {
            Some(current) if current.is_directory() => match place.remove_directory()? {
                Outcome::Skipped(reason) => Ok(Outcome::Skipped(reason)),
                Outcome::Done { .. } => self.rename(number, place, RenameFlags::NOREPLACE),
            },
            Some(current) => self.exchange(number, place, current),
            None => self.rename(number, place, RenameFlags::NOREPLACE),
        }
    }

    fn exchange(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        let renaming = "cannot exchange the new version with the old one";
        failpoint::hit(Point::EtcRename, "").context(renaming)?;
        let name = name(number);
        let swap = || rustix::fs::renameat_with(&self.dir, &name, &place.dir, &place.name, RenameFlags::EXCHANGE);
        match swap() {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Outcome::Skipped(CHANGED)),
            Err(Errno::BUSY) => return Ok(Outcome::Skipped(MOUNTED)),
            // The file system cannot exchange the two, for example overlayfs with directories.
            Err(Errno::INVAL | Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return self.replace(number, place, current);
            }
            Err(error) => return Err(error).context(renaming),
        }
        // The old version is now in the staging directory, where no other process changes it.
        if look(self.dir.as_fd(), &name).context("cannot read the old version")?.as_ref() == Some(current) {
            self.discard(&name).context("cannot remove the old version")?;
            return Ok(DONE);
        }
        swap().context(RESTORING)?;
        Ok(Outcome::Skipped(CHANGED))
    }

    fn replace(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        let directory = rustix::fs::statat(&self.dir, name(number), AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir());
        if !directory {
            return self.rename(number, place, RenameFlags::empty());
        }
        match self.remove_entry(number, place, current)? {
            Outcome::Done { .. } => self.rename(number, place, RenameFlags::NOREPLACE),
            skipped @ Outcome::Skipped(_) => Ok(skipped),
        }
    }

    fn rename(&self, number: usize, place: &Place, flags: RenameFlags) -> Result<Outcome> {
        let renaming = "cannot rename the new version to its final name";
        failpoint::hit(Point::EtcRename, "").context(renaming)?;
        match rustix::fs::renameat_with(&self.dir, name(number), &place.dir, &place.name, flags) {
            Ok(()) => Ok(DONE),
            Err(Errno::BUSY) => Ok(Outcome::Skipped(MOUNTED)),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::ISDIR | Errno::NOTDIR) => {
                Ok(Outcome::Skipped("another process created an entry with this name"))
            }
            Err(error) => Err(error).context(renaming),
        }
    }

    /// Removes the entry at `place`, if it is still `current`.
    pub fn remove(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        if current.is_directory() { place.remove_directory() } else { self.remove_entry(number, place, current) }
    }

    /// Removes the entry at `place`, if it is still `current`, which is not a directory. Keeps a change that another
    /// process makes at the same moment.
    fn remove_entry(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        failpoint::hit(Point::EtcUnlink, "").context("cannot remove it")?;
        let old = [&name(number)[..], b"-old"].concat();
        match rustix::fs::renameat_with(&place.dir, &place.name, &self.dir, &old, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(DONE),
            Err(Errno::BUSY) => return Ok(Outcome::Skipped(MOUNTED)),
            Err(error) => return Err(error).context("cannot remove it"),
        }
        if look(self.dir.as_fd(), &old).context("cannot read it")?.as_ref() == Some(current) {
            self.discard(&old).context("cannot remove it")?;
            return Ok(DONE);
        }
        rustix::fs::renameat_with(&self.dir, &old, &place.dir, &place.name, RenameFlags::NOREPLACE)
            .context(RESTORING)?;
        Ok(Outcome::Skipped(CHANGED))
    }
}

const DONE: Outcome = Outcome::Done { labelled: true };
pub(super) const CHANGED: &str = "changed since the plan was made";
const RESTORING: &str = "cannot restore the version of another process";

fn name(number: usize) -> Vec<u8> {
    number.to_string().into_bytes()
}

/// Syncs the file system of `dir`.
pub(super) fn sync(dir: BorrowedFd<'_>) -> std::io::Result<()> {
    failpoint::hit(Point::EtcSync, "")?;
    Ok(rustix::fs::syncfs(dir)?)
}
