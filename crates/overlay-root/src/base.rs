//! The booted `/usr` as the lower layers of the new one.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags};
use serde::{Deserialize, Serialize};

use super::image::{Composefs, PLACE};
use super::namespace::privately;
use super::tree::{DetachedTree, Layers};
use support::failpoint;

/// The lower layers of the new `/usr`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// The booted `/usr` itself. If it is on an overlay, the new one is stacked on that overlay.
    Directory(PathBuf),
    /// The image from which composefs mounted the booted `/usr`. The new `/usr` is one overlay and needs the booted one
    /// only for its content.
    Composefs(Composefs),
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
        }
    }
}

impl Base {
    /// Mounts an overlay on this base, and another one on that overlay, both in a private mount namespace. Returns true if
    /// the kernel accepts the second one, too.
    ///
    /// # Errors
    /// The kernel refuses the first overlay: too many stacked overlays, or a file system that cannot be a layer.
    pub fn probe(&self) -> Result<bool> {
        privately(|| {
            rustix::mount::mount("probe", PLACE, "tmpfs", MountFlags::empty(), None)
                .with_context(|| format!("cannot mount a tmpfs at {PLACE} in a private namespace"))?;
            let place = Path::new(PLACE);
            let (top, new) = (place.join("top"), place.join("new"));
            for directory in [&top, &new] {
                std::fs::create_dir(directory).with_context(|| format!("cannot create {}", directory.display()))?;
            }
            let tree = DetachedTree::of(self.below(&top), "probe")?;
            rustix::mount::move_mount(tree.as_fd(), "", CWD, &new, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .context("cannot mount the overlay in a private namespace")?;
            Ok(failpoint::suspended(|| DetachedTree::overlay(&[&top, &new], "probe")).is_ok())
        })
    }

    /// Returns the layers of an overlay of `delta` on this base.
    pub(crate) fn below(&self, delta: &Path) -> Layers {
        let mut layers = Layers { directories: vec![delta.to_owned()], image: None };
        match self {
            Self::Directory(path) => layers.directories.push(path.clone()),
            Self::Composefs(image) => layers.image = Some(image.clone()),
        }
        layers
    }
}
