//! The directory in `/etc` in which new versions wait until they are on the disk.
//!
//! A rename reaches the disk before the content of the file that it names: after a power cut, a file that was renamed
//! too early is empty. So the merge and its undo make all new versions in here, sync the file system once, rename the
//! versions into their places, and sync once more. A file system in memory returns from a sync at once.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::place::{Outcome, Place, Source, copy, dress};
use super::scan::{TEMPORARY, look, resolve};
use super::snapshot::{Content, Leaf};
use support::failpoint::{self, Point};

/// The directory, open. A version in it is named by the number of its act.
pub(super) struct Staging {
    etc: OwnedFd,
    dir: OwnedFd,
}

impl Staging {
    /// Opens the directory in `etc`, empty: it removes what a killed call or a power cut left.
    pub fn open(etc: BorrowedFd<'_>) -> Result<Self> {
        let opening = || format!("making /etc/{}", String::from_utf8_lossy(TEMPORARY));
        failpoint::hit(Point::EtcStaging, "").with_context(opening)?;
        match rustix::fs::mkdirat(etc, TEMPORARY, Mode::RWXU) {
            Err(Errno::EXIST) => {}
            other => other.with_context(opening)?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat2(etc, TEMPORARY, flags, Mode::empty(), resolve()).with_context(opening)?;
        let staging = Self { etc: rustix::io::dup(etc).with_context(opening)?, dir };
        staging.clear()?;
        Ok(staging)
    }

    /// Returns true if a call that was killed left the directory.
    pub fn is_left(etc: BorrowedFd<'_>) -> bool {
        rustix::fs::statat(etc, TEMPORARY, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Removes the directory with its content, and waits until everything that was done is on the disk.
    pub fn close(self) -> Result<()> {
        failpoint::hit(Point::EtcStaging, "").context("removing the temporary directory")?;
        self.clear()?;
        rustix::fs::unlinkat(&self.etc, TEMPORARY, AtFlags::REMOVEDIR).context("removing the temporary directory")?;
        self.sync()
    }

    fn clear(&self) -> Result<()> {
        let clearing = "removing leftover temporary files";
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

    /// Waits until everything that was written to the file system of `/etc` is on the disk.
    pub fn sync(&self) -> Result<()> {
        sync(self.etc.as_fd()).context("writing /etc to the disk")
    }

    /// Makes `leaf` with owner, mode, attributes and label. Returns true if the label could be set.
    pub fn make(&self, number: usize, leaf: &Leaf, source: &mut Source<'_>) -> Result<bool> {
        failpoint::hit(Point::EtcMake, "").context("making the new version")?;
        let name = name(number);
        match &leaf.content {
            Content::File { sha256, .. } => {
                let mut content = source.content.take().context("its content is missing from the record")?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&self.dir, &name, flags, Mode::RUSR | Mode::WUSR)
                    .context("making a temporary file")?;
                let written = copy(&mut content, &mut File::from(file))?;
                ensure!(written == *sha256, "its source differs from the plan; plan again");
            }
            Content::Symlink(target) => {
                rustix::fs::symlinkat(&target.0, &self.dir, &name).context("making a temporary link")?;
            }
            Content::Directory => {
                rustix::fs::mkdirat(&self.dir, &name, Mode::RWXU).context("making a temporary directory")?;
            }
            Content::Other => bail!("special files are never made"),
        }
        dress(self.dir.as_fd(), &name, leaf, source)
    }

    /// Renames version `number` to `place`, where `current` was seen last. An entry that another process changes at the
    /// same moment keeps that change. A directory that has to give way leaves a moment with nothing there.
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
        let renaming = "exchanging the new version with the old one";
        failpoint::hit(Point::EtcRename, "").context(renaming)?;
        let name = name(number);
        let swap = || rustix::fs::renameat_with(&self.dir, &name, &place.dir, &place.name, RenameFlags::EXCHANGE);
        match swap() {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Outcome::Skipped(CHANGED)),
            Err(Errno::BUSY) => return Ok(Outcome::Skipped(MOUNTED)),
            // A file system that cannot exchange the two, such as an overlay with directories.
            Err(Errno::INVAL | Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return self.replace(number, place, current);
            }
            Err(error) => return Err(error).context(renaming),
        }
        // What was in the place is in here now, out of the reach of others.
        if look(self.dir.as_fd(), &name).context("looking at the old version")?.as_ref() == Some(current) {
            self.discard(&name).context("removing the old version")?;
            return Ok(DONE);
        }
        swap().context("putting back what another process changed")?;
        Ok(Outcome::Skipped(CHANGED))
    }

    fn replace(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        let directory = rustix::fs::statat(&self.dir, name(number), AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir());
        if !directory {
            return self.rename(number, place, RenameFlags::empty());
        }
        match self.take_out(number, place, current)? {
            Outcome::Done { .. } => self.rename(number, place, RenameFlags::NOREPLACE),
            skipped @ Outcome::Skipped(_) => Ok(skipped),
        }
    }

    fn rename(&self, number: usize, place: &Place, flags: RenameFlags) -> Result<Outcome> {
        let renaming = "renaming the new version into its place";
        failpoint::hit(Point::EtcRename, "").context(renaming)?;
        match rustix::fs::renameat_with(&self.dir, name(number), &place.dir, &place.name, flags) {
            Ok(()) => Ok(DONE),
            Err(Errno::BUSY) => Ok(Outcome::Skipped(MOUNTED)),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::ISDIR | Errno::NOTDIR) => {
                Ok(Outcome::Skipped("something new is there"))
            }
            Err(error) => Err(error).context(renaming),
        }
    }

    /// Removes the entry at `place`, which is `current` and not a directory. An entry that another process changes at
    /// the same moment stays.
    pub fn take_out(&self, number: usize, place: &Place, current: &Leaf) -> Result<Outcome> {
        failpoint::hit(Point::EtcUnlink, "").context("removing it")?;
        let old = [&name(number)[..], b"-old"].concat();
        match rustix::fs::renameat_with(&place.dir, &place.name, &self.dir, &old, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(DONE),
            Err(Errno::BUSY) => return Ok(Outcome::Skipped(MOUNTED)),
            Err(error) => return Err(error).context("removing it"),
        }
        if look(self.dir.as_fd(), &old).context("looking at it")?.as_ref() == Some(current) {
            self.discard(&old).context("removing it")?;
            return Ok(DONE);
        }
        rustix::fs::renameat_with(&self.dir, &old, &place.dir, &place.name, RenameFlags::NOREPLACE)
            .context("putting back what another process changed")?;
        Ok(Outcome::Skipped(CHANGED))
    }
}

const DONE: Outcome = Outcome::Done { labelled: true };
const CHANGED: &str = "changed since the plan was made";
pub(super) const MOUNTED: &str = "something is mounted there";

fn name(number: usize) -> Vec<u8> {
    number.to_string().into_bytes()
}

/// Waits until everything that was written to the file system of `dir` is on the disk.
pub(super) fn sync(dir: BorrowedFd<'_>) -> std::io::Result<()> {
    failpoint::hit(Point::EtcSync, "")?;
    Ok(rustix::fs::syncfs(dir)?)
}
