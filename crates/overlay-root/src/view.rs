//! Private writable views of mounts that are read-only for all other processes.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::mount::MountFlags;
use tracing::warn;

use super::namespace::make_private;
use super::{Namespace, table};

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
    namespace.run(|| {
        make_private()?;
        make_writable(mount_point)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(directory, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", directory.display()))
    })
}

/// Runs `act` on a new thread in a private copy of `namespace`, in which the mounts at `places` are writable. Places without
/// a mount are ignored. Programs that `act` starts are in the private copy, too.
///
/// The mounts of other processes do not change. If a mount is read-only together with its file system, as that of
/// `/boot` on CoreOS, the file system becomes and stays writable, and the mount of other processes stays read-only.
///
/// # Errors
/// As [`writable_view`], and errors of `act`. A file system that stays read-only is not an error.
pub fn with_writable<T: Send>(
    namespace: &Namespace,
    places: &[&Path],
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    namespace.run(|| {
        // This access lets systemd mount an automount. It would not mount anything in the copy.
        places.iter().for_each(|place| drop(rustix::fs::statvfs(*place)));
        let mounts = namespace.mounts()?;
        make_private()?;
        for mount in places.iter().filter_map(|place| table::top(&mounts, place)) {
            let kept = make_writable(&mount.target)?;
            // The kernel makes a file system with errors read-only, but not its mounts.
            if mount.read_only
                && mount_flags(&mount.target)?.contains(StatVfsMountFlags::RDONLY)
                && let Err(error) = rustix::mount::mount_remount(&mount.target, kept, "")
            {
                warn!("cannot make the file system at {} writable: {error}", mount.target.display());
            }
        }
        act()
    })
}

/// Makes the mount writable in the namespace of the calling thread. Returns its other flags.
fn make_writable(mount_point: &Path) -> Result<MountFlags> {
    let flags = mount_flags(mount_point)?;
    let keep = [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    ];
    let kept = keep.iter().filter(|(is, _)| flags.contains(*is)).map(|(_, flag)| *flag).collect();
    rustix::mount::mount_remount(mount_point, MountFlags::BIND | kept, "")
        .with_context(|| format!("cannot make {} writable in a private namespace", mount_point.display()))?;
    Ok(kept)
}

fn mount_flags(mount_point: &Path) -> Result<StatVfsMountFlags> {
    let stat = rustix::fs::statvfs(mount_point)
        .with_context(|| format!("cannot read the mount flags of {}", mount_point.display()))?;
    Ok(stat.f_flag)
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

    #[test]
    fn a_read_only_file_system_is_writable_in_private_only() {
        private(|scratch| {
            let [boot, broken, plain] = ["boot", "broken", "plain"].map(|name| scratch.join(name));
            for dir in [&boot, &broken, &plain] {
                fs::create_dir(dir).unwrap();
            }
            mount("none", &boot, "tmpfs", MountFlags::RDONLY | MountFlags::NODEV, None).unwrap();
            mount("none", &broken, "tmpfs", MountFlags::RDONLY, None).unwrap();
            rustix::mount::mount_remount(&broken, MountFlags::BIND, "").unwrap();
            let places = [boot.as_path(), broken.as_path(), plain.as_path()];

            with_writable(&here(), &places, || {
                fs::write(boot.join("entry"), "e").unwrap();
                assert!(mount_flags(&boot).unwrap().contains(StatVfsMountFlags::NODEV));
                assert!(fs::write(broken.join("entry"), "").is_err(), "the kernel made it read-only");
                Ok(())
            })
            .unwrap();

            assert_eq!(fs::read(boot.join("entry")).unwrap(), b"e");
            assert!(fs::write(boot.join("other"), "").is_err(), "read-only for other processes");
        });
    }
}
