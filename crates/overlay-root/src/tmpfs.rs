//! The tmpfs of the RAM store.

use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_string,
};

use super::Namespace;
use super::table::{self, Exposure};

/// Mounts a tmpfs named `source` at `path` in `namespace`, with the mode 0700 and a limit of `limit_bytes` of content.
/// If it is mounted already, only changes its limit. Returns true if this call mounted it.
///
/// The mount is nosuid and nodev. Setuid programs and whiteouts still work through an overlay, which has its own flags, but
/// no setuid object can be run by its path in the store.
///
/// # Errors
/// Another mount covers it, the limit is below the used bytes, or the kernel refuses. The mounts are then unchanged.
pub fn tmpfs(namespace: &Namespace, path: &Path, limit_bytes: u64, source: &str) -> Result<bool> {
    let place = path.display();
    match table::exposure(&namespace.mounts()?, path, source) {
        Exposure::OnTop => {
            let limit = format!("{limit_bytes}");
            namespace
                .run(|| resize(path, &limit).with_context(|| format!("cannot set the limit of the tmpfs {place}")))?;
            return Ok(false);
        }
        Exposure::Covered => {
            bail!("cannot use the tmpfs {source} at {place}: another mount covers it; unmount that mount first")
        }
        Exposure::Absent => {}
    }
    namespace.run(|| {
        std::fs::create_dir_all(path).with_context(|| format!("cannot create {place}"))?;
        mount(path, limit_bytes, source).with_context(|| format!("cannot mount a tmpfs at {place}"))
    })?;
    Ok(true)
}

/// Returns the default SELinux label on a tmpfs, or `None` without SELinux. It is read from a new, detached tmpfs.
///
/// # Errors
/// The kernel refuses to create a tmpfs.
pub fn tmpfs_label() -> Result<Option<String>> {
    let tmpfs = || -> rustix::io::Result<_> {
        let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&fs)?;
        let tree = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        rustix::fs::openat(&tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let root = tmpfs().context("cannot create a tmpfs")?;
    let mut label = vec![0; 4096];
    match rustix::fs::fgetxattr(&root, selinux_labels::ATTRIBUTE, &mut label) {
        Ok(length) => Ok(Some(String::from_utf8_lossy(&label[..length]).trim_end_matches('\0').to_owned())),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error).context("cannot read the label of a tmpfs"),
    }
}

fn mount(path: &Path, limit_bytes: u64, source: &str) -> Result<()> {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen(tmpfs)")?;
    fsconfig_set_string(&fs, "source", source).context("cannot set source")?;
    fsconfig_set_string(&fs, "size", format!("{limit_bytes}")).context("cannot set size")?;
    fsconfig_set_string(&fs, "mode", "0700").context("cannot set mode")?;
    // On tmpfs each hard link counts as an inode, and the delta tree consists of links. The default limit, half the number
    // of memory pages, is too low for small machines. The limit of the content still applies.
    fsconfig_set_string(&fs, "nr_inodes", "0").context("cannot set nr_inodes")?;
    fsconfig_create(&fs).context("cannot create the file system")?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOATIME;
    let tree = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context("fsmount")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty()).context("cannot open the mount point")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&tree, "", &directory, "", flags).context("move_mount")
}

fn resize(path: &Path, limit: &str) -> Result<()> {
    let fs = rustix::mount::fspick(CWD, path, FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW)
        .context("fspick")?;
    fsconfig_set_string(&fs, "size", limit).context("cannot set size")?;
    match fsconfig_reconfigure(&fs) {
        Err(Errno::INVAL) => bail!("{limit} bytes are less than the used bytes"),
        other => other.context("cannot apply the new size"),
    }
}

/// Returns the bytes used in the tmpfs at `path` in the caller's namespace.
pub fn tmpfs_used(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).with_context(|| format!("cannot read the usage of {}", path.display()))?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::testing::here;
    use support::testing::private;

    #[test]
    fn a_tmpfs_is_mounted_once_and_resized_but_not_below_its_usage() {
        private(|scratch| {
            let store = scratch.join("deep/store");
            assert!(tmpfs(&here(), &store, 1 << 20, "nip:store").unwrap());
            assert_eq!(fs::metadata(&store).unwrap().permissions().mode() & 0o7777, 0o700);
            fs::write(store.join("object"), vec![1; 600 << 10]).unwrap();
            let limit = || {
                let stat = rustix::fs::statvfs(&store).unwrap();
                stat.f_blocks * stat.f_frsize
            };
            assert_eq!((tmpfs_used(&store).unwrap(), limit()), (600 << 10, 1 << 20));
            assert!(fs::write(store.join("more"), vec![1; 600 << 10]).is_err());
            fs::remove_file(store.join("more")).unwrap();

            assert!(!tmpfs(&here(), &store, 2 << 20, "nip:store").unwrap(), "mounted already");
            assert_eq!((tmpfs_used(&store).unwrap(), limit()), (600 << 10, 2 << 20));
            let error = tmpfs(&here(), &store, 4096, "nip:store").unwrap_err();
            assert!(format!("{error:#}").contains("less than the used bytes"), "{error:#}");
            assert!(here().withdraw(&store, "nip:store").unwrap());
        });
    }
}
