//! Writes objects into a bare repo, and compares each checksum before the object becomes visible.
//!
//! libostree's content streams are not used: an image names every object before its content, so one pass can hash and
//! write, on any number of threads. A regular file is written to an unnamed file (`O_TMPFILE`) on the repo's file system.
//! It is linked to its name after its checksum was compared, so a kill leaves nothing behind. Symlinks cannot be unnamed
//! and are checked first.
//!
//! This module syncs nothing: in a disk store, pending objects are synced together (see `disk`).

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use support::xattr;

pub use super::header::{FileMeta, Xattrs};
use super::object::{ObjectId, ObjectType, loose_path};

/// Bytes that an object needs besides its content: half a block at its end on average, and an inode.
const BLOCK: usize = 4096;

/// Error of writing an object. The object did not become visible.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The checksum differs from the name.
    #[error("object {id}.{} has the checksum {actual}", kind.extension())]
    Mismatch {
        /// Expected name.
        id: ObjectId,
        /// Type of the object.
        kind: ObjectType,
        /// Checksum of the content.
        actual: ObjectId,
    },
    /// An operation of the file system failed.
    #[error("cannot store object {object}: cannot {step}")]
    Io {
        /// `CHECKSUM.TYPE`.
        object: String,
        /// The failed step, such as "set its mode".
        step: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Writes objects into one repo, from any thread.
#[derive(Debug)]
pub struct ObjectWriter {
    repo: PathBuf,
    dir: OwnedFd,
    serial: AtomicU64,
    root: bool,
    substituted_xattrs: AtomicU64,
    /// Bytes that may still be written.
    remaining: AtomicU64,
}

/// A file without a name, and the part of the writer's limit that it uses. Unless the file gets a name, the part is
/// returned when it is dropped.
#[derive(Debug)]
struct UnnamedFile<'a> {
    writer: &'a ObjectWriter,
    file: File,
    reserved: u64,
}

/// A regular file that is being written. Small content is held in memory, because it may turn out not to be wanted. Larger
/// content is written to a file without a name. It is removed when dropped before [`FileWrite::finish`].
#[derive(Debug)]
pub struct FileWrite<'a> {
    writer: &'a ObjectWriter,
    /// The name, if it is known before the content.
    id: Option<ObjectId>,
    meta: FileMeta,
    hasher: Sha256,
    held: Vec<u8>,
    file: Option<UnnamedFile<'a>>,
}

impl ObjectWriter {
    /// Opens `repo`. The writer writes at most `limit` bytes; each object counts for one block more than its content.
    pub(super) fn new(repo: &Path, limit: u64) -> io::Result<Self> {
        let dir = rustix::fs::open(repo, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            repo: repo.to_owned(),
            dir,
            serial: AtomicU64::new(0),
            root: rustix::process::geteuid().is_root(),
            substituted_xattrs: AtomicU64::new(0),
            remaining: AtomicU64::new(limit),
        })
    }

    /// Takes a part of the limit, and returns its size.
    fn reserve(&self, bytes: usize) -> io::Result<u64> {
        let bytes = bytes as u64;
        let less = |remaining: u64| remaining.checked_sub(bytes);
        let reserved = self.remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        reserved.map(|_| bytes).map_err(|_| io::ErrorKind::StorageFull.into())
    }

    /// Returns the space of a removed content object to the limit.
    pub(super) fn removed(&self, object: &Metadata) {
        if object.is_file() {
            // Holes use no space.
            let size = object.len().min(object.blocks() * 512) + BLOCK as u64;
            let more = |remaining: u64| Some(remaining.saturating_add(size));
            let _ = self.remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        }
    }

    /// Returns one line for each kind of metadata that the file system does not support.
    pub fn warnings(&self) -> Vec<String> {
        match self.substituted_xattrs.load(Ordering::Relaxed) {
            0 => Vec::new(),
            count => vec![format!(
                "programs do not see {count} user.* attributes: the node store's file system does not support them"
            )],
        }
    }

    /// Sets attributes with `set`. tmpfs does not support `user.*` before Linux 6.6. Such attributes get another name and a
    /// warning, because no program of an operating system depends on them, but copies of the object do.
    fn set_xattrs(
        &self,
        id: &ObjectId,
        meta: &FileMeta,
        set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), WriteError> {
        for (name, value) in meta.xattrs.iter() {
            let substituted = xattr::set_with(name, value, &set);
            let substituted = substituted.map_err(|errno| xattr_failed(id, name, value, errno))?;
            self.substituted_xattrs.fetch_add(u64::from(substituted), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Stores a metadata object, unless it exists.
    ///
    /// # Errors
    /// The SHA-256 differs from the name. A `CommitMeta` is not compared, because it is named after its commit.
    pub fn metadata(&self, id: &ObjectId, kind: ObjectType, content: &[u8]) -> Result<(), WriteError> {
        if kind != ObjectType::CommitMeta {
            check(id, kind, Sha256::new_with_prefix(content))?;
        }
        let failed = |step: &'static str| fail(id, kind, step);
        let mut file = self.unnamed_file().map_err(failed("create its file"))?;
        file.append(content).map_err(failed("write its file"))?;
        rustix::fs::fchmod(&file.file, Mode::from_raw_mode(0o644)).map_err(fail(id, kind, "set its mode"))?;
        self.name(file, id, kind)
    }

    /// Stores a symlink, unless it exists.
    pub fn symlink(&self, id: &ObjectId, meta: &FileMeta) -> Result<(), WriteError> {
        let kind = ObjectType::File;
        check(id, kind, meta.hasher())?;
        let failed = |step: &'static str| fail(id, kind, step);
        let temp = format!("tmp/import-{}-{}", std::process::id(), self.serial.fetch_add(1, Ordering::Relaxed));
        let target = meta.target.as_deref().unwrap_or_default();
        rustix::fs::symlinkat(target, &self.dir, &temp).map_err(failed("create the symlink"))?;
        let prepared = self.prepare_symlink(&temp, meta, id).and_then(|()| {
            match rustix::fs::linkat(&self.dir, &temp, &self.dir, loose_path(id, kind), AtFlags::empty()) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(failed("name it")(errno)),
            }
        });
        // The next import removes the temporary name if this fails.
        let _ = rustix::fs::unlinkat(&self.dir, &temp, AtFlags::empty());
        prepared
    }

    fn prepare_symlink(&self, temp: &str, meta: &FileMeta, id: &ObjectId) -> Result<(), WriteError> {
        if self.root || (meta.uid, meta.gid) != own_ids() {
            let (uid, gid) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
            rustix::fs::chownat(&self.dir, temp, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(fail(
                id,
                ObjectType::File,
                "set its owner",
            ))?;
        }
        let path = self.repo.join(temp);
        self.set_xattrs(id, meta, |name, value| rustix::fs::lsetxattr(&path, name, value, XattrFlags::empty()))
    }

    /// Starts a regular file. `id` is its name, or `None` if its checksum is not known yet.
    pub fn begin(&self, id: Option<ObjectId>, meta: FileMeta) -> FileWrite<'_> {
        let hasher = meta.hasher();
        FileWrite { writer: self, id, meta, hasher, held: Vec::new(), file: None }
    }

    fn unnamed_file(&self) -> io::Result<UnnamedFile<'_>> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, "tmp", flags, Mode::from_raw_mode(0o600))?.into();
        Ok(UnnamedFile { writer: self, file, reserved: self.reserve(BLOCK)? })
    }

    /// Sets the metadata of a file, then its name. The owner precedes the mode (chown clears set-id bits), both precede
    /// xattrs (chown clears capabilities), and the time is last.
    fn seal(&self, unnamed: UnnamedFile<'_>, id: &ObjectId, meta: &FileMeta) -> Result<(), WriteError> {
        let failed = |step: &'static str| fail(id, ObjectType::File, step);
        let file = &unnamed.file;
        if !self.root || (meta.uid, meta.gid) != (0, 0) {
            rustix::fs::fchown(file, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))
                .map_err(failed("set its owner"))?;
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(meta.mode & 0o7777)).map_err(failed("set its mode"))?;
        self.set_xattrs(id, meta, |name, value| rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()))?;
        // All content of an ostree repo has the time 0, so that programs that compare times (Python, Guile) behave the
        // same on every system.
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
        };
        rustix::fs::futimens(file, &times).map_err(failed("set its time"))?;
        self.name(unnamed, id, ObjectType::File)
    }

    fn name(&self, mut file: UnnamedFile<'_>, id: &ObjectId, kind: ObjectType) -> Result<(), WriteError> {
        let unnamed = format!("/proc/self/fd/{}", file.file.as_fd().as_raw_fd());
        let path = loose_path(id, kind);
        match rustix::fs::linkat(rustix::fs::CWD, unnamed, &self.dir, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {
                file.reserved = 0;
                Ok(())
            }
            // Another layer contained the same object; equal names imply equal content.
            Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(fail(id, kind, "name it")(errno)),
        }
    }
}

impl UnnamedFile<'_> {
    /// Appends content within the limit of the writer.
    fn append(&mut self, content: &[u8]) -> io::Result<()> {
        self.reserved += self.writer.reserve(content.len())?;
        self.file.write_all(content)
    }

    /// Appends a hole and moves the position behind it.
    fn hole(&mut self, length: u64) -> io::Result<()> {
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let end = self.file.seek(SeekFrom::Current(i64::try_from(length).map_err(too_large)?))?;
        self.file.set_len(end)
    }
}

impl Drop for UnnamedFile<'_> {
    fn drop(&mut self) {
        self.writer.remaining.fetch_add(self.reserved, Ordering::Relaxed);
    }
}

impl<'a> FileWrite<'a> {
    /// Limit of the content in memory, in bytes.
    const MOST_HELD: usize = 512 * 1024;

    /// Returns the file without a name, after the held content is written to it.
    fn file(&mut self) -> Result<&mut UnnamedFile<'a>, WriteError> {
        Ok(match &mut self.file {
            Some(file) => file,
            none => {
                let mut file = self.writer.unnamed_file().map_err(fail_content(self.id, "create its file"))?;
                file.append(&std::mem::take(&mut self.held)).map_err(fail_content(self.id, "write its file"))?;
                none.insert(file)
            }
        })
    }

    /// Appends content.
    pub fn write(&mut self, content: &[u8]) -> Result<(), WriteError> {
        self.hasher.update(content);
        if self.file.is_none() && self.held.len() + content.len() <= Self::MOST_HELD {
            self.held.extend_from_slice(content);
            return Ok(());
        }
        let failed = fail_content(self.id, "write its file");
        self.file()?.append(content).map_err(failed)
    }

    /// Appends a hole of `length` zero bytes. They are hashed but not stored.
    pub fn hole(&mut self, length: u64) -> Result<(), WriteError> {
        hash_zeros(&mut self.hasher, length);
        let free = Self::MOST_HELD.saturating_sub(self.held.len());
        let fits = usize::try_from(length).ok().filter(|more| *more <= free);
        if let (Some(length), None) = (fits, &self.file) {
            self.held.resize(self.held.len() + length, 0);
            return Ok(());
        }
        let failed = fail_content(self.id, "write a hole in its file");
        self.file()?.hole(length).map_err(failed)
    }

    /// Compares the checksum with the name, then makes the object visible if `keep` returns true for the name. Returns the
    /// name, and true if the object was stored.
    pub fn finish(mut self, keep: impl FnOnce(&ObjectId) -> bool) -> Result<(ObjectId, bool), WriteError> {
        let actual = ObjectId(std::mem::take(&mut self.hasher).finalize().into());
        if let Some(id) = self.id.replace(actual).filter(|id| *id != actual) {
            return Err(WriteError::Mismatch { id, kind: ObjectType::File, actual });
        }
        if !keep(&actual) {
            return Ok((actual, false));
        }
        self.file()?;
        let Self { writer, meta, file, .. } = self;
        let stored = file.map(|file| writer.seal(file, &actual, &meta)).transpose()?.is_some();
        Ok((actual, stored))
    }
}

fn hash_zeros(hasher: &mut Sha256, mut length: u64) {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    while length > 0 {
        let count = length.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..count as usize]);
        length -= count;
    }
}

fn fail_content(id: Option<ObjectId>, step: &'static str) -> impl FnOnce(io::Error) -> WriteError {
    move |source| {
        let object = id.map_or_else(|| "(checksum not known yet)".to_owned(), |id| format!("{id}.file"));
        WriteError::Io { object, step: step.to_owned(), source }
    }
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

fn fail<E: Into<io::Error>>(
    id: &ObjectId,
    kind: ObjectType,
    step: &'static str,
) -> impl FnOnce(E) -> WriteError + use<E> {
    let id = *id;
    let object = move || format!("{id}.{}", kind.extension());
    move |error| WriteError::Io { object: object(), step: step.to_owned(), source: error.into() }
}

fn xattr_failed(id: &ObjectId, name: &[u8], value: &[u8], errno: Errno) -> WriteError {
    let mut step = format!("set its attribute {}", name.escape_ascii());
    if name == selinux_labels::ATTRIBUTE.as_bytes() && errno == Errno::INVAL {
        let label = value.strip_suffix(b"\0").unwrap_or(value).escape_ascii();
        step = format!("{step} to {label}: {}", selinux_labels::advice(selinux_labels::context().as_deref()));
    }
    WriteError::Io { object: format!("{id}.file"), step, source: errno.into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
