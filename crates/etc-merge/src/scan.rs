//! Reads a directory tree into a [`Snapshot`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::name::Bytes;
use super::snapshot::{Content, Entry, Leaf, Meta, Obstacle, Snapshot};
use support::xattr::{self, LABEL};

/// Returns flags that open entries below the given directory only: not through a symbolic link, not in another mount.
pub(super) fn resolve() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV
}

/// Name of the directory of [`super::staging`] in `/etc`. A scan ignores it.
pub(super) const STAGING: &[u8] = b".node-image-pivot-new";

/// Levels of directories that a scan enters. Each level keeps directories open, and an unprivileged user could nest
/// directories without bound.
pub const MAX_DEPTH: usize = 100;

/// Reads everything below `dir`. Does not follow symbolic links. Does not enter mount points and directories of other
/// file systems; their entry is [`Content::Other`]. Skips entries that vanish during the scan.
///
/// # Errors
/// An entry cannot be read; the message has its path.
pub fn scan(dir: BorrowedFd<'_>) -> Result<Snapshot> {
    let root = rustix::fs::openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context("cannot open the directory")?;
    let seen = examine(root.as_fd(), b".").context("cannot read the directory")?;
    let children = Scan { device: seen.device }.children(root, &Bytes::default(), 0)?;
    Ok(Snapshot { root: Entry { leaf: seen.leaf, obstacle: seen.obstacle, children } })
}

struct Scan {
    /// Major and minor number of the file system's device.
    device: (u32, u32),
}

impl Scan {
    fn children(&self, dir: OwnedFd, path: &Bytes, depth: usize) -> Result<BTreeMap<Vec<u8>, Entry>> {
        let reading = || format!("cannot read the directory {path}");
        let mut children = BTreeMap::new();
        for entry in Dir::read_from(&dir).with_context(reading)? {
            let entry = entry.with_context(reading)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || (depth == 0 && name == STAGING) {
                continue;
            }
            let child = path.join(name);
            let seen = match retry_once(|| examine(dir.as_fd(), name)) {
                Err(Errno::NOENT) => continue,
                other => other.with_context(|| format!("cannot read {child}"))?,
            };
            if let Some(entry) = self.entry(dir.as_fd(), name, &child, seen, depth)? {
                children.insert(name.to_vec(), entry);
            }
        }
        Ok(children)
    }

    /// Returns the entry with everything below it; `None` if it vanished.
    fn entry(&self, dir: BorrowedFd<'_>, name: &[u8], path: &Bytes, seen: Seen, depth: usize) -> Result<Option<Entry>> {
        let mut entry = Entry { leaf: seen.leaf, obstacle: seen.obstacle, children: BTreeMap::new() };
        if !entry.leaf.is_directory() {
            return Ok(Some(entry));
        }
        // Only directories are compared: an overlay reports the devices of its layers for files.
        let foreign = (seen.device != self.device).then_some(Obstacle::FileSystem);
        if let Some(obstacle) = foreign.or((depth >= MAX_DEPTH).then_some(Obstacle::Depth)) {
            entry.leaf.content = Content::Other;
            entry.obstacle = Some(obstacle);
            return Ok(Some(entry));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve()) {
            Ok(below) => {
                entry.children = self.children(below, path, depth + 1)?;
                Ok(Some(entry))
            }
            // Another process replaced or removed the directory.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot open the directory {path}")),
        }
    }
}

/// Returns the entry `name` of `dir` without its children; `None` if it is missing.
pub(super) fn look(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Leaf>, Errno> {
    match retry_once(|| examine(dir, name)) {
        Err(Errno::NOENT) => Ok(None),
        other => other.map(|seen| Some(seen.leaf)),
    }
}

/// Calls `look` again if the entry changed its type between two system calls.
fn retry_once<T>(look: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    match look() {
        Err(Errno::LOOP | Errno::INVAL) => look(),
        other => other,
    }
}

/// An entry without its children.
struct Seen {
    leaf: Leaf,
    obstacle: Option<Obstacle>,
    /// Major and minor number of the device that holds it.
    device: (u32, u32),
}

fn examine(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Seen, Errno> {
    let other =
        |mode, uid, gid| Leaf { content: Content::Other, meta: Meta { mode, uid, gid, xattrs: BTreeMap::new() } };
    let stat = match stat(dir, name) {
        // A mount whose server does not respond. The merge needs no data of it.
        Err(error) if error != Errno::NOENT && is_mount_point(dir, name) => {
            return Ok(Seen { leaf: other(0, 0, 0), obstacle: None, device: (0, 0) });
        }
        other => other?,
    };
    let device = (stat.stx_dev_major, stat.stx_dev_minor);
    let has = |attribute| stat.stx_attributes.contains(attribute);
    let locked = match () {
        () if has(StatxAttributes::IMMUTABLE) => Some(Obstacle::Immutable),
        () if has(StatxAttributes::APPEND) => Some(Obstacle::AppendOnly),
        () => None,
    };
    let other = other(mode(&stat), stat.stx_uid, stat.stx_gid);
    let kind = FileType::from_raw_mode(u32::from(stat.stx_mode));
    // The root of the scan can be a mount point, as `/etc` is on live media.
    let content = if has(StatxAttributes::MOUNT_ROOT) && name != b"." {
        Content::Other
    } else if kind == FileType::RegularFile {
        match open(dir, name).and_then(digest) {
            Ok((size, sha256)) => Content::File { size, sha256 },
            Err(Errno::AGAIN) => return Ok(Seen { leaf: other, obstacle: Some(Obstacle::Lease), device }),
            Err(error) => return Err(error),
        }
    } else if kind == FileType::Symlink {
        Content::Symlink(Bytes(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes()))
    } else if kind == FileType::Directory {
        Content::Directory
    } else {
        Content::Other
    };
    // The merge does not compare attributes of special files, and some file systems cannot read them.
    let leaf = if content == Content::Other { other } else { Leaf { content, meta: meta(&stat, dir, name)? } };
    let obstacle = locked.filter(|_| leaf.content != Content::Other);
    Ok(Seen { leaf, obstacle, device })
}

fn stat(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Statx, Errno> {
    // `STATX_DONT_SYNC` avoids waiting for the server of a network file system.
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
}

/// Returns true if a file system is mounted at `name`. Does not access that file system.
fn is_mount_point(dir: BorrowedFd<'_>, name: &[u8]) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve()).is_err_and(|error| error == Errno::XDEV)
}

fn mode(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & 0o7777
}

fn meta(stat: &Statx, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Meta, Errno> {
    let mut xattrs = xattr::read(&proc_path(dir, name))?;
    xattrs.remove(LABEL);
    let xattrs = xattrs.into_iter().map(|(name, value)| (Bytes(name), Bytes(value))).collect();
    Ok(Meta { mode: mode(stat), uid: stat.stx_uid, gid: stat.stx_gid, xattrs })
}

/// Returns a path through the open directory, for system calls without a directory argument. Another process cannot
/// replace a component above `name`. Callers use system calls that do not follow the last component.
pub(super) fn proc_path(dir: BorrowedFd<'_>, name: &[u8]) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(Bytes(name.to_vec()).as_path());
    path
}

/// Opens a regular file for reading. Does not block if a fifo has replaced it.
pub(super) fn open(dir: BorrowedFd<'_>, path: &[u8]) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve())?.into())
}

fn digest(mut file: File) -> Result<(u64, String), Errno> {
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = [0; 32 * 1024];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((size, hex::encode(hash.finalize()))),
            Ok(length) => {
                hash.update(&buffer[..length]);
                size += length as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }
}
