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
use super::snapshot::{Content, Entry, Leaf, Meta, Snapshot};
use super::xattr::{self, LABEL};

/// How entries are opened: below the directory given, through no link, into no other mount.
pub(super) fn resolve() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV
}

/// The directory in `/etc` of [`super::staging`]. A scan leaves it out.
pub(super) const TEMPORARY: &[u8] = b".node-image-pivot-new";

/// Reads everything below `dir`. Nothing is followed through a symbolic link; a mount point is
/// recorded as such and not looked into. What vanishes during the scan is left out.
///
/// # Errors
/// When something cannot be read; the path is in the message. Nothing is ever written.
pub fn scan(dir: BorrowedFd<'_>) -> Result<Snapshot> {
    let root = rustix::fs::openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context("opening the directory to scan")?;
    let path = Bytes::default();
    let meta = meta(&stat(root.as_fd(), b".")?, root.as_fd(), b".").context("looking at the directory to scan")?;
    let leaf = Leaf { content: Content::Directory, meta };
    Ok(Snapshot { root: Entry { leaf, children: children(root, &path)? } })
}

fn children(dir: OwnedFd, path: &Bytes) -> Result<BTreeMap<Vec<u8>, Entry>> {
    let reading = || format!("reading the directory {path}");
    let mut children = BTreeMap::new();
    for entry in Dir::read_from(&dir).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." || (path.0.is_empty() && name == TEMPORARY) {
            continue;
        }
        let child = path.join(name);
        match look(dir.as_fd(), name) {
            Ok(Some(leaf)) => {
                let below = match leaf.content {
                    Content::Directory => descend(dir.as_fd(), name, &child)?,
                    _ => Some(BTreeMap::new()),
                };
                if let Some(below) = below {
                    children.insert(name.to_vec(), Entry { leaf, children: below });
                }
            }
            Ok(None) => {}
            Err(error) => return Err(error).with_context(|| format!("reading {child}")),
        }
    }
    Ok(children)
}

fn descend(dir: BorrowedFd<'_>, name: &[u8], path: &Bytes) -> Result<Option<BTreeMap<Vec<u8>, Entry>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve()) {
        Ok(below) => Ok(Some(children(below, path)?)),
        // Replaced or gone since we looked at it.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("opening the directory {path}")),
    }
}

/// The entry `name` of `dir`, without what is below it; `None` when there is none.
pub(super) fn look(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Leaf>, Errno> {
    match look_once(dir, name) {
        Err(Errno::NOENT) => Ok(None),
        // It changed its kind between two calls; one more look decides.
        Err(Errno::LOOP | Errno::INVAL) => look_once(dir, name).map(Some),
        other => other.map(Some),
    }
}

fn look_once(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Leaf, Errno> {
    let stat = stat(dir, name)?;
    let kind = FileType::from_raw_mode(u32::from(stat.stx_mode));
    // The directory that the handle itself names may be a mount point, as /etc is on live media.
    let content = if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) && name != b"." {
        Content::Other
    } else if kind == FileType::RegularFile {
        let (size, sha256) = digest(open(dir, name)?)?;
        Content::File { size, sha256 }
    } else if kind == FileType::Symlink {
        Content::Symlink(Bytes(rustix::fs::readlinkat(dir, name, Vec::new())?.into_bytes()))
    } else if kind == FileType::Directory {
        Content::Directory
    } else {
        Content::Other
    };
    // Attributes of a special file are nobody's business, and not readable on every file system.
    let meta = match content {
        Content::Other => Meta { mode: mode(&stat), uid: stat.stx_uid, gid: stat.stx_gid, xattrs: BTreeMap::new() },
        _ => meta(&stat, dir, name)?,
    };
    Ok(Leaf { content, meta })
}

fn stat(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)
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

/// A path for the calls that take no directory handle: it goes through the open handle, so nobody can
/// swap what is above, and those calls do not follow its last component.
pub(super) fn proc_path(dir: BorrowedFd<'_>, name: &[u8]) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(Bytes(name.to_vec()).as_path());
    path
}

/// Opens a regular file for reading. A fifo that took its place does not block us.
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
