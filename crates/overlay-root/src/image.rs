//! The composefs image of a booted deployment, mounted in a private namespace.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
};
use serde::{Deserialize, Serialize};

use support::command::Program;

/// Time limit of mount(8).
const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);
/// Directory of every system at which a private mount namespace can have its own mounts.
pub(crate) const PLACE: &str = "/var";

/// A composefs image: an erofs file system with directories and metadata. The content of files is in an ostree repo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Composefs {
    /// The image file.
    pub path: PathBuf,
    /// The directory `objects` of the repo.
    pub objects: PathBuf,
}

impl Composefs {
    /// Mounts the image in the namespace of the calling thread, where it hides other directories, and opens its `/usr`.
    pub(crate) fn open_usr(&self) -> Result<OwnedFd> {
        let place = self.path.display();
        match self.mount_file() {
            // The kernel mounts erofs only from block devices, or not from files of this file system.
            Err(Errno::NOTBLK | Errno::INVAL) => self.mount_loop(),
            other => other.map_err(Into::into),
        }
        .with_context(|| format!("cannot mount the composefs image {place}"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(Path::new(PLACE).join("usr"), flags, Mode::empty())
            .with_context(|| format!("cannot open /usr in the composefs image {place}"))
    }

    fn mount_file(&self) -> rustix::io::Result<()> {
        let fs = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&fs, "source", &self.path)?;
        fsconfig_set_flag(&fs, "ro")?;
        fsconfig_create(&fs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        let tree = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        rustix::mount::move_mount(&tree, "", CWD, PLACE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }

    /// Mounts the image through a loop device, which ends with the last use of the image.
    fn mount_loop(&self) -> Result<()> {
        let image = self.path.to_str().context("its path is not UTF-8")?;
        let mount = ["/usr/bin/mount", "-t", "erofs", "-o", "ro,nodev,loop", image, PLACE];
        Program::new(&mount, MOUNT_TIMEOUT).end_blocking()?.success()?;
        Ok(())
    }
}
