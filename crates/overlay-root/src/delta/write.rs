//! Writes files, links and directories with their metadata.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};

use super::overlay_marks;
use super::source::meta_of;
use node_store::store::DirMeta;
use support::xattr;

pub(super) fn create_link(target: &Path, meta: &DirMeta, directory: BorrowedFd<'_>, name: &str) -> Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
    rustix::fs::symlinkat(target, directory, name).context("cannot create the link")?;
    rustix::fs::chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).context("cannot set the owner")?;
    // Attributes of a link cannot be set by descriptor, so this path starts at the directory's.
    let place = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    set_attributes(meta, |name, value| rustix::fs::lsetxattr(&place, name, value, XattrFlags::empty()))
}

pub(super) fn create_file(content: &mut dyn Read, meta: &DirMeta, directory: BorrowedFd<'_>, name: &str) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut file =
        File::from(rustix::fs::openat(directory, name, flags, Mode::RUSR).context("cannot create the file")?);
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match content.read(&mut buffer).context("cannot read the booted system's file")? {
            0 => break,
            length => std::io::Write::write_all(&mut file, &buffer[..length]).context("cannot write the file")?,
        }
    }
    set_metadata(file.as_fd(), meta)
}

/// Copies `from`, a content object or an entry of the booted `/usr`, to `name`, and all entries below it if `recursive`.
/// Entries that are neither files, links nor directories are omitted, as in ostree.
pub(super) fn copy_entry(from: &Path, directory: BorrowedFd<'_>, name: &str, recursive: bool) -> Result<()> {
    let failed = || format!("cannot copy {}", from.display());
    let kind = std::fs::symlink_metadata(from).with_context(failed)?.file_type();
    let meta = meta_of(from)?;
    if kind.is_symlink() {
        let target = std::fs::read_link(from).with_context(failed)?;
        return create_link(&target, &meta, directory, name).with_context(failed);
    }
    if kind.is_file() {
        let mut content = File::open(from).with_context(failed)?;
        return create_file(&mut content, &meta, directory, name).with_context(failed);
    }
    if !kind.is_dir() {
        return Ok(());
    }
    rustix::fs::mkdirat(directory, name, Mode::RWXU).with_context(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let copied = rustix::fs::openat(directory, name, flags, Mode::empty()).with_context(failed)?;
    if recursive {
        for entry in std::fs::read_dir(from).with_context(failed)? {
            let entry = entry.with_context(failed)?;
            // As in a listing of the booted tree.
            let Ok(name) = entry.file_name().into_string() else { continue };
            copy_entry(&entry.path(), copied.as_fd(), &name, true)?;
        }
    }
    set_metadata(copied.as_fd(), &meta).with_context(failed)
}

fn attribute(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let hint = match &*name {
        selinux_labels::ATTRIBUTE if selinux_labels::mode() != selinux_labels::Mode::Disabled => {
            format!(
                " (if the loaded policy does not know its label: {})",
                selinux_labels::advice(selinux_labels::context().as_deref())
            )
        }
        _ => String::new(),
    };
    format!("cannot set {name}{hint}")
}

/// Sets attributes with `set`, except for those that overlayfs would interpret. Those that the file system does not support
/// have a substitute, as in the node store.
fn set_attributes(meta: &DirMeta, set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>) -> Result<()> {
    let mut all = meta.xattrs.iter().filter(|(name, _)| !overlay_marks::is_attribute(name));
    all.try_for_each(|(name, value)| xattr::set_with(name, value, &set).map(drop).with_context(|| attribute(name)))
}

/// Sets the metadata of a file or directory. The owner is first, because a change of the owner clears setuid bits and
/// capabilities. The time is 0, as in ostree.
pub(super) fn set_metadata(fd: BorrowedFd<'_>, meta: &DirMeta) -> Result<()> {
    rustix::fs::fchown(fd, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))
        .context("cannot set the owner")?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode & 0o7777)).context("cannot set the mode")?;
    set_attributes(meta, |name, value| rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()))?;
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::fs::futimens(fd, &Timestamps { last_access: zero, last_modification: zero }).context("cannot set the time")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    /// As on a tmpfs before Linux 6.6.
    #[test]
    fn attributes_that_the_file_system_refuses_get_a_substitute() {
        let temp = tempfile::tempdir().unwrap();
        let pair = |name: &str| (name.as_bytes().to_vec(), b"value".to_vec());
        let meta = DirMeta { uid: 0, gid: 0, mode: 0o755, xattrs: vec![pair("user.test"), pair("trusted.test")] };
        let set = |name: &[u8], value: &[u8]| match name.starts_with(b"user.") {
            true => Err(Errno::OPNOTSUPP),
            false => rustix::fs::lsetxattr(temp.path(), name, value, XattrFlags::empty()),
        };
        set_attributes(&meta, set).unwrap();
        let mut found = xattr::read(temp.path()).unwrap();
        found.remove(xattr::LABEL);
        assert_eq!(found, meta.xattrs.into_iter().collect());
    }
}
