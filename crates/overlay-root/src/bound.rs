//! A complete tree that is bound over the booted `/usr`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::image::PLACE;
use super::namespace::privately;
use super::table::MODULES;

/// The parts of a new `/usr` without an overlay.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    /// The complete tree.
    pub(crate) tree: PathBuf,
    /// The booted `/usr`, whose kernel modules are mounted in the tree.
    pub(crate) usr: PathBuf,
}

impl Bound {
    /// Builds a detached, read-only tree. The mount of the kernel modules is part of it.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        let Self { tree, usr } = self;
        privately(|| {
            let modules = usr.join(MODULES);
            let has_modules = modules.is_dir();
            let copies = [Some(tree), Some(&modules).filter(|_| has_modules)];
            let copies: Vec<_> = copies.into_iter().flatten().map(|path| clone(path)).collect::<Result<_>>()?;
            // The descriptors stay valid when the first mount hides the paths.
            for (mount, place) in copies.iter().zip([PathBuf::from(PLACE), Path::new(PLACE).join(MODULES)]) {
                rustix::mount::move_mount(mount, "", CWD, &place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                    .and_then(|()| {
                        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV;
                        rustix::mount::mount_remount(&place, flags, "")
                    })
                    .with_context(|| format!("cannot mount {} in a private namespace", tree.display()))?;
            }
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
            rustix::mount::open_tree(CWD, PLACE, flags).with_context(|| format!("cannot detach {}", tree.display()))
        })
    }
}

/// Returns a detached bind mount of `path`.
fn clone(path: &Path) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags).with_context(|| format!("cannot bind {}", path.display()))
}
