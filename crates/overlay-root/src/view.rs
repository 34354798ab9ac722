//! Private writable views of mounts that are read-only for all other processes.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::mount::MountFlags;

use super::Namespace;
use super::namespace::make_private;

/// Opens `directory`, which is on the mount at `mount_point` in `namespace`, for writing. While the descriptor is open,
/// files can be written and linked through `/proc/self/fd/N/…`. The mounts of other processes do not change.
///
/// The function creates a temporary mount namespace and makes the mount writable there. The descriptor keeps that mount
/// alive after the namespace has ended. (`open_tree` with `mount_setattr` would need no namespace, but has no safe wrapper
/// yet.)
///
/// # Errors
/// The kernel refuses. A read-only file system is not detected here; the first write to it fails.
pub fn writable_view(namespace: &Namespace, mount_point: &Path, directory: &Path) -> Result<OwnedFd> {
    with_writable(namespace, &[mount_point.to_owned()], || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(directory, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", directory.display()))
    })
}

/// Runs `act` on a new thread in a private copy of `namespace`, in which the mounts at `mount_points` are writable. The
/// mounts of other processes do not change. Programs that `act` starts are in the private copy, too.
///
/// # Errors
/// As [`writable_view`], and errors of `act`.
pub fn with_writable<T: Send>(
    namespace: &Namespace,
    mount_points: &[PathBuf],
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    namespace.run(|| {
        make_private()?;
        mount_points.iter().try_for_each(|place| make_writable(place))?;
        act()
    })
}

fn make_writable(mount_point: &Path) -> Result<()> {
    let place = mount_point.display();
    let flags =
        rustix::fs::statvfs(mount_point).with_context(|| format!("cannot read the mount flags of {place}"))?.f_flag;
    let keep = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    ];
    let kept = keep.iter().filter(|(is, _)| flags.contains(*is)).fold(MountFlags::BIND, |all, (_, flag)| all | *flag);
    rustix::mount::mount_remount(mount_point, kept, "")
        .with_context(|| format!("cannot make {place} writable in a private namespace"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;

    use rustix::mount::mount;

    use super::*;
    use crate::testing::here;
    use support::testing::private;

    #[test]
    fn the_view_is_writable_and_other_mounts_stay_read_only() {
        private(|scratch| {
            let (disk, repo) = (scratch.join("disk"), scratch.join("disk/ostree/repo"));
            fs::create_dir(&disk).unwrap();
            mount("none", &disk, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::create_dir_all(&repo).unwrap();
            fs::write(repo.join("object"), "o").unwrap();
            rustix::mount::mount_remount(&disk, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID, "")
                .unwrap();
            let before = here().mounts().unwrap();

            let view = writable_view(&here(), &disk, &repo).unwrap();
            let writable = Path::new("/proc/self/fd").join(view.as_raw_fd().to_string());
            fs::write(writable.join("new"), "n").unwrap();
            fs::hard_link(writable.join("object"), writable.join("link")).unwrap();
            let unnamed = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&view, ".", unnamed, Mode::RUSR).unwrap();
            assert!(rustix::fs::fstatvfs(&view).unwrap().f_flag.contains(StatVfsMountFlags::NOSUID));

            assert_eq!(fs::read(repo.join("new")).unwrap(), b"n", "the same file system");
            assert!(fs::write(repo.join("other"), "").is_err(), "read-only by its path");
            assert_eq!(here().mounts().unwrap(), before);
        });
    }
}
