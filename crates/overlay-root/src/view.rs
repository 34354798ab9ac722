//! A directory on a mount that may be written, though everybody else's mount of it may not.

use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::Namespace;

/// Opens `directory`, which is on the mount at `mount_point` in `namespace`, for writing: by
/// `/proc/self/fd/N/…` it can be written, and links can be made within it, for as long as the descriptor is
/// open. Nobody else's mounts change.
///
/// A mount namespace of our own is made and left again, with the mount made writable in there; the
/// descriptor keeps that one mount alive. (`open_tree` with `mount_setattr` would do without the
/// namespace, but has no safe wrapper yet.)
///
/// # Errors
/// When the kernel refuses. A file system that is read-only itself is not noticed before the first write.
pub fn writable_view(namespace: &Namespace, mount_point: &Path, directory: &Path) -> Result<OwnedFd> {
    namespace.run(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace of our own")?;
        // Nothing that is done in here may come through to where we are from.
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .context("making the mounts private")?;
        let place = mount_point.display();
        let flags = rustix::fs::statvfs(mount_point).with_context(|| format!("looking at {place}"))?.f_flag;
        let keep = [
            (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
            (StatVfsMountFlags::NODEV, MountFlags::NODEV),
            (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
            (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        ];
        let kept =
            keep.iter().filter(|(is, _)| flags.contains(*is)).fold(MountFlags::BIND, |all, (_, flag)| all | *flag);
        rustix::mount::mount_remount(mount_point, kept, "")
            .with_context(|| format!("making a mount of {place} that can be written"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(directory, flags, Mode::empty()).with_context(|| format!("opening {}", directory.display()))
    })
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
    fn we_write_what_others_only_read() {
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
            let ours = Path::new("/proc/self/fd").join(view.as_raw_fd().to_string());
            fs::write(ours.join("new"), "n").unwrap();
            fs::hard_link(ours.join("object"), ours.join("link")).unwrap();
            let nameless = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&view, ".", nameless, Mode::RUSR).unwrap();
            assert!(rustix::fs::fstatvfs(&view).unwrap().f_flag.contains(StatVfsMountFlags::NOSUID));

            assert_eq!(fs::read(repo.join("new")).unwrap(), b"n", "it is the same file system");
            assert!(fs::write(repo.join("other"), "").is_err(), "which everybody else only reads");
            assert_eq!(here().mounts().unwrap(), before);
        });
    }
}
