//! Writing objects into a bare repo, checked before they can be seen.
//!
//! Not through libostree's content streams: an image names every object before its content, so one
//! pass can hash and write, on any number of threads. A regular file is written to a nameless file
//! (`O_TMPFILE`) of the repo's own file system and linked to its name after its checksum was found
//! right; a kill leaves nothing behind. Symlinks cannot be nameless and are checked first.
//!
//! Nothing is synced here: on a disk, objects wait elsewhere for one sync of all (see `disk`).

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

pub use super::header::{FileMeta, Xattrs};
use super::object::{ObjectId, ObjectType, loose_path};

/// What an object costs besides its content: half a block at its end, and an inode.
const BLOCK: usize = 4096;

/// Why an object was not stored.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The content is not what the name says. Nothing was made visible.
    #[error("object {id}.{} has the checksum {actual}", kind.extension())]
    Mismatch {
        /// The name that was asked for.
        id: ObjectId,
        /// Its type.
        kind: ObjectType,
        /// What the content hashes to.
        actual: ObjectId,
    },
    /// The store could not take it.
    #[error("storing object {object}: {what}")]
    Io {
        /// `CHECKSUM.type`.
        object: String,
        /// The step that failed.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes into one repo, from any thread.
#[derive(Debug)]
pub struct ObjectWriter {
    repo: PathBuf,
    dir: OwnedFd,
    serial: AtomicU64,
    root: bool,
    dropped_xattrs: AtomicU64,
    /// How many bytes may still be written.
    room: AtomicI64,
}

/// A regular file on its way: nameless until [`FileWrite::finish`], gone when dropped before.
#[derive(Debug)]
pub struct FileWrite<'a> {
    writer: &'a ObjectWriter,
    id: ObjectId,
    meta: FileMeta,
    file: File,
    hasher: Sha256,
}

impl ObjectWriter {
    /// Writes at most `room` bytes, and a file system block for each object.
    pub(super) fn new(repo: &Path, room: u64) -> io::Result<Self> {
        let dir = rustix::fs::open(repo, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            repo: repo.to_owned(),
            dir,
            serial: AtomicU64::new(0),
            root: rustix::process::geteuid().is_root(),
            dropped_xattrs: AtomicU64::new(0),
            room: AtomicI64::new(i64::try_from(room).unwrap_or(i64::MAX)),
        })
    }

    /// Writes to a file of ours, as long as there is room.
    fn put(&self, file: &mut File, content: &[u8]) -> io::Result<()> {
        self.take(content.len())?;
        file.write_all(content)
    }

    fn take(&self, bytes: usize) -> io::Result<()> {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        if self.room.fetch_sub(bytes, Ordering::Relaxed) < bytes {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// What could not be stored as it should have been, one line each.
    pub fn warnings(&self) -> Vec<String> {
        match self.dropped_xattrs.load(Ordering::Relaxed) {
            0 => Vec::new(),
            count => vec![format!("{count} user.* attributes were left out: the node store's file system has none")],
        }
    }

    /// Sets attributes with `set`. tmpfs has no `user.*` before Linux 6.6: leaving those out is a
    /// warning, as nothing in an operating system's own files depends on them.
    fn set_xattrs(
        &self,
        id: &ObjectId,
        meta: &FileMeta,
        set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), WriteError> {
        for (name, value) in meta.xattrs.iter() {
            match set(name, value) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) if name.starts_with(b"user.") => {
                    self.dropped_xattrs.fetch_add(1, Ordering::Relaxed);
                }
                Err(errno) => return Err(xattr_failed(id, name, value, errno)),
            }
        }
        Ok(())
    }

    /// Stores a metadata object. Its SHA-256 must be its name, except for a `CommitMeta`, which is
    /// named by its commit. One that is there already is left alone.
    pub fn metadata(&self, id: &ObjectId, kind: ObjectType, content: &[u8]) -> Result<(), WriteError> {
        if kind != ObjectType::CommitMeta {
            check(id, kind, Sha256::new_with_prefix(content))?;
        }
        let step = |what: &'static str| fail(id, kind, what);
        let mut file = self.nameless().map_err(step("creating it"))?;
        self.put(&mut file, content).map_err(step("writing"))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))
            .map_err(io::Error::from)
            .map_err(step("setting its mode"))?;
        self.name(&file, id, kind)
    }

    /// Stores a symlink.
    pub fn symlink(&self, id: &ObjectId, meta: &FileMeta) -> Result<(), WriteError> {
        let kind = ObjectType::File;
        check(id, kind, meta.hasher())?;
        let step = |what: &'static str| fail(id, kind, what);
        let temp = format!("tmp/import-{}-{}", std::process::id(), self.serial.fetch_add(1, Ordering::Relaxed));
        let target = meta.target.as_deref().unwrap_or_default();
        rustix::fs::symlinkat(target, &self.dir, &temp)
            .map_err(io::Error::from)
            .map_err(step("creating the symlink"))?;
        let prepared = self.prepare_symlink(&temp, meta, id).and_then(|()| {
            match rustix::fs::linkat(&self.dir, &temp, &self.dir, loose_path(id, kind), AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(step("naming it")(errno.into())),
            }
        });
        // Whether or not it got its name, the temporary one goes; a failure to remove it costs an inode.
        let _ = rustix::fs::unlinkat(&self.dir, &temp, AtFlags::empty());
        prepared
    }

    fn prepare_symlink(&self, temp: &str, meta: &FileMeta, id: &ObjectId) -> Result<(), WriteError> {
        let step = |what: &'static str| fail(id, ObjectType::File, what);
        if self.root || (meta.uid, meta.gid) != own_ids() {
            let (uid, gid) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
            rustix::fs::chownat(&self.dir, temp, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(io::Error::from)
                .map_err(step("setting its owner"))?;
        }
        let path = self.repo.join(temp);
        self.set_xattrs(id, meta, |name, value| rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty()))
    }

    /// Stores a regular file whose content is at hand.
    pub fn file(&self, id: &ObjectId, meta: &FileMeta, content: &[u8]) -> Result<(), WriteError> {
        let mut hasher = meta.hasher();
        hasher.update(content);
        check(id, ObjectType::File, hasher)?;
        let mut file = self.nameless().map_err(fail(id, ObjectType::File, "creating it"))?;
        self.put(&mut file, content).map_err(fail(id, ObjectType::File, "writing"))?;
        self.seal(&file, id, meta)
    }

    /// Starts a regular file that is too large to be held in memory.
    pub fn begin(&self, id: &ObjectId, meta: FileMeta) -> Result<FileWrite<'_>, WriteError> {
        let file = self.nameless().map_err(fail(id, ObjectType::File, "creating it"))?;
        let hasher = meta.hasher();
        Ok(FileWrite { writer: self, id: *id, meta, file, hasher })
    }

    /// Starts a regular file whose checksum is not known beforehand, of any size.
    pub fn begin_unnamed(&self, meta: FileMeta) -> Result<UnnamedWrite<'_>, WriteError> {
        let hasher = meta.hasher();
        Ok(UnnamedWrite { writer: self, meta, hasher, held: Vec::new(), file: None })
    }

    fn nameless(&self) -> io::Result<File> {
        self.take(BLOCK)?;
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.dir, "tmp", flags, Mode::from_raw_mode(0o600))?.into())
    }

    /// Owner before mode (chown clears set-id bits), both before xattrs (chown clears capabilities),
    /// time last; then the name.
    fn seal(&self, file: &File, id: &ObjectId, meta: &FileMeta) -> Result<(), WriteError> {
        let step = |what: &'static str| fail(id, ObjectType::File, what);
        if !self.root || (meta.uid, meta.gid) != (0, 0) {
            rustix::fs::fchown(file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))
                .map_err(io::Error::from)
                .map_err(step("setting its owner"))?;
        }
        let mode = Mode::from_raw_mode(meta.mode & 0o7777);
        rustix::fs::fchmod(file, mode).map_err(io::Error::from).map_err(step("setting its mode"))?;
        self.set_xattrs(id, meta, |name, value| rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()))?;
        // All content of an ostree repo is from 1970: what compares times (compiled Python, Guile)
        // sees the same on every system.
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
        };
        rustix::fs::futimens(file, &times).map_err(io::Error::from).map_err(step("setting its time"))?;
        self.name(file, id, ObjectType::File)
    }

    fn name(&self, file: &File, id: &ObjectId, kind: ObjectType) -> Result<(), WriteError> {
        let nameless = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let path = loose_path(id, kind);
        match rustix::fs::linkat(rustix::fs::CWD, nameless, &self.dir, &path, AtFlags::SYMLINK_FOLLOW) {
            // Another layer carried the same object: equal names are equal content.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(fail(id, kind, "naming it")(errno.into())),
        }
    }
}

impl FileWrite<'_> {
    /// Appends content.
    pub fn write(&mut self, content: &[u8]) -> Result<(), WriteError> {
        self.hasher.update(content);
        self.writer.put(&mut self.file, content).map_err(fail(&self.id, ObjectType::File, "writing"))
    }

    /// Appends zeros without storing them: a hole. They are hashed, at the speed of SHA-256.
    pub fn hole(&mut self, length: u64) -> Result<(), WriteError> {
        hash_zeros(&mut self.hasher, length);
        grow(&mut self.file, length).map_err(fail(&self.id, ObjectType::File, "leaving a hole"))
    }

    /// Checks the whole, then makes it visible.
    pub fn finish(self) -> Result<(), WriteError> {
        check(&self.id, ObjectType::File, self.hasher)?;
        self.writer.seal(&self.file, &self.id, &self.meta)
    }
}

/// A regular file whose name will be known at its end. Small ones wait in memory, so that those that
/// turn out not to be wanted cost nothing; larger ones go to a nameless file.
#[derive(Debug)]
pub struct UnnamedWrite<'a> {
    writer: &'a ObjectWriter,
    meta: FileMeta,
    hasher: Sha256,
    held: Vec<u8>,
    file: Option<File>,
}

impl UnnamedWrite<'_> {
    /// How much waits in memory.
    const HELD: usize = 512 * 1024;

    /// Appends content.
    pub fn write(&mut self, content: &[u8]) -> Result<(), WriteError> {
        self.hasher.update(content);
        if self.file.is_none() && self.held.len() + content.len() > Self::HELD {
            self.file = Some(self.writer.nameless().map_err(unnamed("creating it"))?);
        }
        let Some(file) = &mut self.file else {
            self.held.extend_from_slice(content);
            return Ok(());
        };
        let held = std::mem::take(&mut self.held);
        let writer = self.writer;
        writer.put(file, &held).and_then(|()| writer.put(file, content)).map_err(unnamed("writing"))
    }

    /// Appends zeros without storing them: a hole. They are hashed, at the speed of SHA-256.
    pub fn hole(&mut self, length: u64) -> Result<(), WriteError> {
        let fits = usize::try_from(length).ok().filter(|more| *more <= Self::HELD - self.held.len().min(Self::HELD));
        if let (Some(length), None) = (fits, &self.file) {
            hash_zeros(&mut self.hasher, length as u64);
            self.held.resize(self.held.len() + length, 0);
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = none.insert(self.writer.nameless().map_err(unnamed("creating it"))?);
                file.write_all(&std::mem::take(&mut self.held)).map_err(unnamed("writing"))?;
                file
            }
        };
        hash_zeros(&mut self.hasher, length);
        grow(file, length).map_err(unnamed("leaving a hole"))
    }

    /// The object's name; it is stored under it when `keep` says so, and gone otherwise.
    pub fn finish(self, keep: impl FnOnce(&ObjectId) -> bool) -> Result<(ObjectId, bool), WriteError> {
        let id = ObjectId(self.hasher.finalize().into());
        if !keep(&id) {
            return Ok((id, false));
        }
        let step = |what: &'static str| fail(&id, ObjectType::File, what);
        let file = match self.file {
            Some(file) => file,
            None => {
                let mut file = self.writer.nameless().map_err(step("creating it"))?;
                self.writer.put(&mut file, &self.held).map_err(step("writing"))?;
                file
            }
        };
        self.writer.seal(&file, &id, &self.meta)?;
        Ok((id, true))
    }
}

/// Makes the file longer by a hole and goes behind it.
fn grow(file: &mut File, length: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let end = file.seek(SeekFrom::Current(i64::try_from(length).map_err(too_large)?))?;
    file.set_len(end)
}

fn hash_zeros(hasher: &mut Sha256, mut length: u64) {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    while length > 0 {
        let count = length.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..count as usize]);
        length -= count;
    }
}

fn unnamed(what: &'static str) -> impl FnOnce(io::Error) -> WriteError {
    move |source| WriteError::Io { object: "that has no name yet".into(), what: what.into(), source }
}

fn own_ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

fn check(id: &ObjectId, kind: ObjectType, hasher: Sha256) -> Result<(), WriteError> {
    let actual = ObjectId(hasher.finalize().into());
    if actual == *id {
        return Ok(());
    }
    Err(WriteError::Mismatch { id: *id, kind, actual })
}

fn fail(id: &ObjectId, kind: ObjectType, what: &'static str) -> impl FnOnce(io::Error) -> WriteError + use<> {
    let id = *id;
    move |source| WriteError::Io { object: format!("{id}.{}", kind.extension()), what: what.to_owned(), source }
}

fn xattr_failed(id: &ObjectId, name: &[u8], value: &[u8], errno: Errno) -> WriteError {
    let mut what = format!("setting the attribute {}", name.escape_ascii());
    if name == selinux_labels::ATTRIBUTE.as_bytes() && errno == Errno::INVAL {
        let label = value.strip_suffix(b"\0").unwrap_or(value).escape_ascii();
        what = format!("{what} to {label}: {}", selinux_labels::advice(selinux_labels::context().as_deref()));
    }
    WriteError::Io { object: format!("{id}.file"), what, source: errno.into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
