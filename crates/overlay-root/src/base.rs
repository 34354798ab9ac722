//! The ways in which the new `/usr` replaces the booted one.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags};
use serde::{Deserialize, Serialize};

use super::bound::Bound;
use super::image::{Composefs, PLACE};
use super::namespace::privately;
use super::table::MODULES;
use super::tree::{DetachedTree, Layers, Recipe};
use support::failpoint;

/// The way in which the new `/usr` replaces the booted one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// An overlay on the booted `/usr`. If that is on an overlay, the new one is stacked on it.
    Directory(PathBuf),
    /// One overlay on the image from which composefs mounted the booted `/usr`. It needs the booted `/usr` only for its
    /// content.
    Composefs(Composefs),
    /// A bind mount of a complete tree, for kernels that accept no overlay on the booted `/usr`, which is at this path. The
    /// tree is beside the delta, and its name is the source of the mount.
    Bound(PathBuf),
}

impl Default for Base {
    fn default() -> Self {
        Self::Directory("/usr".into())
    }
}

/// Names the mount of the new `/usr`.
impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "an overlay over {}", path.display()),
            Self::Composefs(image) => write!(f, "one overlay over the composefs image {}", image.path.display()),
            Self::Bound(path) => write!(f, "a complete tree, bound over {} without an overlay", path.display()),
        }
    }
}

impl Base {
    /// Mounts a new `/usr` of this kind, and an overlay on it, both in a private mount namespace. Returns true if the kernel
    /// accepts the overlay, too.
    ///
    /// # Errors
    /// The kernel refuses the first mount: too many stacked overlays, or a file system that cannot be a layer.
    pub fn probe(&self) -> Result<bool> {
        privately(|| {
            rustix::mount::mount("probe", PLACE, "tmpfs", MountFlags::empty(), None)
                .with_context(|| format!("cannot mount a tmpfs at {PLACE} in a private namespace"))?;
            let place = Path::new(PLACE);
            let (top, new) = (place.join("top"), place.join("new"));
            for directory in [&top, &new, &place.join("probe").join(MODULES)] {
                std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
            }
            let tree = DetachedTree::of(self.recipe(&top, "probe"), "probe")?;
            rustix::mount::move_mount(tree.as_fd(), "", CWD, &new, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .context("cannot mount the new /usr in a private namespace")?;
            Ok(failpoint::suspended(|| DetachedTree::overlay(&[&top, &new], "probe")).is_ok())
        })
    }

    /// Returns the parts of the new `/usr`. `source` is the name of its mount.
    pub(crate) fn recipe(&self, delta: &Path, source: &str) -> Recipe {
        let mut layers = Layers { directories: vec![delta.to_owned()], image: None };
        match self {
            Self::Directory(path) => layers.directories.push(path.clone()),
            Self::Composefs(image) => layers.image = Some(image.clone()),
            Self::Bound(usr) => return Recipe::Bound(Bound { tree: delta.with_file_name(source), usr: usr.clone() }),
        }
        Recipe::Overlay(layers)
    }
}
