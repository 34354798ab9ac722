//! Checks that a deployment fits before anything is written.

use std::collections::HashSet;
use std::path::Path;

use node_store::store::ObjectId;
use ostree::prelude::{FileEnumeratorExt, FileExt};
use ostree::{gio, glib};
use rustix::fs::{StatVfs, StatVfsMountFlags, statvfs};
use rustix::io::Errno;
use support::human_bytes;
use tracing::info;

use super::error::{DeployError, failed, listed};

/// Assumed size of a block if that of the file system is smaller.
const BLOCK: u64 = 4096;
/// Size of a file's or directory's entry in a composefs image.
const IMAGE_ENTRY: u64 = 256;
const ATTRIBUTES: &str = "standard::name,standard::type,standard::size";

/// The objects of an image, and the share of them that a repo lacks.
#[derive(Debug, Default)]
pub(crate) struct Missing {
    /// All objects of the image and its layers.
    pub all: HashSet<ostree::ObjectName>,
    pub count: usize,
    pub bytes: u64,
    /// Space for fs-verity of all objects that have none.
    pub seals: u64,
    /// Directories of the commits, those that the repo has included.
    pub directories: u64,
    /// Size of a block of the disk in bytes. A file needs at most one besides its content, with its inode.
    pub block: u64,
}

/// Compares the space that a commit of `repo` needs with the free space of the sysroot and of its `/boot`, which may be another
/// file system.
pub(crate) fn check(
    sysroot: &ostree::Sysroot,
    repo: &ostree::Repo,
    commit: &ObjectId,
    missing: &Missing,
    cancel: &gio::Cancellable,
) -> Result<(), DeployError> {
    let fail = || failed("list the image's files");
    let (root, _) = repo.read_commit(&commit.to_string(), Some(cancel)).map_err(fail())?;
    let (etc, etc_files) =
        size_below(&root.resolve_relative_path("usr/etc"), missing.block, &|_| true).map_err(fail())?;
    let is_boot_file = |name: &Path| {
        let name = name.to_string_lossy();
        name.starts_with("vmlinuz") || name.starts_with("initramfs") || name.ends_with(".dtb")
    };
    // Deployments of one commit share the kernel in /boot.
    let has_kernel = sysroot.deployments().iter().any(|other| other.csum() == commit.to_string());
    let boot = match has_kernel {
        true => 0,
        false => {
            size_below(&root.resolve_relative_path("usr/lib/modules"), missing.block, &is_boot_file).map_err(fail())?.0
        }
    };
    let reserve = sysroot.repo().min_free_space_bytes().unwrap_or(0);
    let mut parts = vec![
        ("for objects", missing.bytes),
        ("for the deployment", missing.directories * missing.block + missing.all.len() as u64 * IMAGE_ENTRY + etc),
        ("that ostree keeps free", reserve),
    ];
    parts.extend((missing.seals > 0).then_some(("for fs-verity", missing.seals)));
    let path = sysroot.path().path().unwrap_or_default();
    let boot_path = path.join("boot");
    // The root directory of a running system may be a composefs.
    let (disk, boot_disk) = (space(&path.join("ostree/repo"))?, boot_space(&path)?);
    match boot_disk.filter(|boot_disk| boot_disk.f_fsid != disk.f_fsid) {
        Some(boot_disk) => compare(&boot_path, vec![("for the kernel", boot)], &boot_disk)?,
        None => parts.push(("for the kernel", boot)),
    }
    let inodes = missing.count as u64 + missing.directories + etc_files;
    // 0: the file system has no limit.
    if disk.f_files > 0 && inodes > disk.f_favail {
        return Err(DeployError::TooFewInodes { path, needed: inodes, free: disk.f_favail });
    }
    compare(&path, parts, &disk)
}

/// Returns true if the repo of the sysroot or its `/boot` is on a read-only mount or file system. A missing `/boot` is in the
/// root directory of the sysroot.
pub(crate) fn is_read_only(sysroot: &Path) -> Result<bool, DeployError> {
    let repo = space(&sysroot.join("ostree/repo"))?.f_flag;
    let boot = boot_space(sysroot)?.map_or(repo, |disk| disk.f_flag);
    Ok((repo | boot).contains(StatVfsMountFlags::RDONLY))
}

/// Returns the size of a block, with which the file system of a repo allots space.
pub(crate) fn block(repo: &ostree::Repo) -> Result<u64, DeployError> {
    Ok(space(&repo.path().path().unwrap_or_default())?.f_frsize.max(BLOCK))
}

fn space(path: &Path) -> Result<StatVfs, DeployError> {
    statvfs(path).map_err(|error| failure(path, error))
}

/// Returns `None` if `sysroot` has no `/boot`.
fn boot_space(sysroot: &Path) -> Result<Option<StatVfs>, DeployError> {
    let path = sysroot.join("boot");
    match statvfs(&path) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(failure(&path, error)),
    }
}

fn failure(path: &Path, error: Errno) -> DeployError {
    DeployError::Failed { step: "read the free space", cause: format!("{}: {error}", path.display()) }
}

fn compare(path: &Path, parts: Vec<(&'static str, u64)>, disk: &StatVfs) -> Result<(), DeployError> {
    let free = disk.f_bavail * disk.f_frsize;
    info!("the deployment needs {} on {}; {} are free", listed(&parts), path.display(), human_bytes(free));
    match parts.iter().map(|(_, bytes)| bytes).sum::<u64>() > free {
        true => Err(DeployError::TooLittle { path: path.to_owned(), parts, free }),
        false => Ok(()),
    }
}

/// Returns the size and the number of the files below a directory of a commit for whose names `counts` returns true, with a
/// block of `block` bytes more for each. A missing directory has none.
fn size_below(dir: &gio::File, block: u64, counts: &dyn Fn(&Path) -> bool) -> Result<(u64, u64), glib::Error> {
    let (mut sum, mut number) = (0, 0);
    let mut queue = vec![dir.clone()];
    while let Some(dir) = queue.pop() {
        let flags = gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS;
        let entries = match dir.enumerate_children(ATTRIBUTES, flags, gio::Cancellable::NONE) {
            Err(error) if error.matches(gio::IOErrorEnum::NotFound) => continue,
            other => other?,
        };
        while let Some(entry) = entries.next_file(gio::Cancellable::NONE)? {
            match entry.file_type() {
                gio::FileType::Directory => queue.push(dir.child(entry.name())),
                _ if counts(&entry.name()) => {
                    sum += u64::try_from(entry.size()).unwrap_or(0) + block;
                    number += 1;
                }
                _ => {}
            }
        }
    }
    Ok((sum, number))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_sysroot_without_boot_is_as_writable_as_its_repo() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(temp.path().join("ostree/repo")).unwrap();
        assert!(!is_read_only(temp.path()).unwrap());
    }

    #[test]
    fn a_boot_that_cannot_be_read_is_not_a_missing_one() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(temp.path().join("ostree/repo")).unwrap();
        std::os::unix::fs::symlink("boot", temp.path().join("boot")).unwrap();
        let error = is_read_only(temp.path()).unwrap_err().to_string();
        assert!(error.contains("/boot: "), "{error}");
    }
}
