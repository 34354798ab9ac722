//! The node store's own tmpfs.

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

/// How full a tmpfs is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TmpfsUse {
    /// Bytes that file content occupies.
    pub used: u64,
    /// The limit on that.
    pub limit: u64,
}

/// Mounts a tmpfs for the node store at `path` in `namespace`, named `source`, mode 0700, holding at
/// most `limit_bytes` of content. Where it is mounted already, only its limit is set: it may grow or
/// shrink, but not below what is used. Returns whether it was mounted now.
///
/// It is mounted nosuid and nodev: an overlay's own flags decide for files seen through it, so setuid
/// programs and whiteouts in the store work, and nobody can run a stored object by its own path.
///
/// # Errors
/// When something else is mounted over it, or the kernel refuses; nothing is changed then.
pub fn tmpfs(namespace: &Namespace, path: &Path, limit_bytes: u64, source: &str) -> Result<bool> {
    let place = path.display();
    match table::exposure(&namespace.mounts()?, path, source) {
        Exposure::OnTop => {
            let limit = format!("{limit_bytes}");
            namespace
                .run(|| resize(path, &limit).with_context(|| format!("setting the limit of the tmpfs {place}")))?;
            return Ok(false);
        }
        Exposure::Covered => bail!("another mount covers the tmpfs {source} at {place}: unmount that one first"),
        Exposure::Absent => {}
    }
    namespace.run(|| {
        std::fs::create_dir_all(path).with_context(|| format!("creating {place}"))?;
        mount(path, limit_bytes, source).with_context(|| format!("mounting a tmpfs at {place}: nothing was mounted"))
    })?;
    Ok(true)
}

/// The label of what nobody labelled on a tmpfs: what the root of a new one has, which is attached nowhere. `None`
/// without SELinux.
///
/// # Errors
/// When the kernel refuses to make one.
pub fn tmpfs_label() -> Result<Option<String>> {
    let tmpfs = || -> rustix::io::Result<_> {
        let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&fs)?;
        let tree = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        rustix::fs::openat(&tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let root = tmpfs().context("making a tmpfs")?;
    let mut label = vec![0; 4096];
    match rustix::fs::fgetxattr(&root, selinux_labels::ATTRIBUTE, &mut label) {
        Ok(length) => Ok(Some(String::from_utf8_lossy(&label[..length]).trim_end_matches('\0').to_owned())),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error).context("reading the label of a tmpfs"),
    }
}

fn mount(path: &Path, limit_bytes: u64, source: &str) -> Result<()> {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("opening tmpfs")?;
    fsconfig_set_string(&fs, "source", source).context("setting its source")?;
    fsconfig_set_string(&fs, "size", format!("{limit_bytes}")).context("setting its limit")?;
    fsconfig_set_string(&fs, "mode", "0700").context("setting its mode")?;
    // Every hard link counts as an inode here, and the delta tree is made of links: the default, half
    // the number of memory pages, is too low for small machines. The content limit still holds.
    fsconfig_set_string(&fs, "nr_inodes", "0").context("lifting its limit on inodes")?;
    fsconfig_create(&fs).context("creating it")?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOATIME;
    let tree =
        rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context("making a mount of it")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty()).context("opening the mount point")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&tree, "", &directory, "", flags).context("attaching it")
}

fn resize(path: &Path, limit: &str) -> Result<()> {
    let fs = rustix::mount::fspick(CWD, path, FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW)
        .context("opening the mounted file system")?;
    fsconfig_set_string(&fs, "size", limit).context("setting size")?;
    match fsconfig_reconfigure(&fs) {
        Err(Errno::INVAL) => bail!("{limit} bytes are less than it holds already; the limit stays as it was"),
        other => other.context("applying the new size"),
    }
}

/// How full the tmpfs at `path` is, as the caller's namespace sees it.
pub fn tmpfs_used(path: &Path) -> Result<TmpfsUse> {
    let stat = rustix::fs::statfs(path).with_context(|| format!("asking how full {} is", path.display()))?;
    let size = stat.f_bsize.unsigned_abs();
    Ok(TmpfsUse { used: (stat.f_blocks - stat.f_bfree) * size, limit: stat.f_blocks * size })
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
    fn mounted_once_resized_and_measured() {
        private(|scratch| {
            let store = scratch.join("deep/store");
            assert!(tmpfs(&here(), &store, 1 << 20, "nip:store").unwrap());
            assert_eq!(fs::metadata(&store).unwrap().permissions().mode() & 0o7777, 0o700);
            fs::write(store.join("object"), vec![1; 600 << 10]).unwrap();
            let now = tmpfs_used(&store).unwrap();
            assert_eq!((now.used, now.limit), (600 << 10, 1 << 20));
            assert!(fs::write(store.join("more"), vec![1; 600 << 10]).is_err());
            fs::remove_file(store.join("more")).unwrap();

            assert!(!tmpfs(&here(), &store, 2 << 20, "nip:store").unwrap(), "mounted already");
            assert_eq!(tmpfs_used(&store).unwrap(), TmpfsUse { used: 600 << 10, limit: 2 << 20 });
            let error = tmpfs(&here(), &store, 4096, "nip:store").unwrap_err();
            assert!(format!("{error:#}").contains("less than it holds"), "{error:#}");
            assert!(here().withdraw(&store, "nip:store").unwrap());
        });
    }
}
