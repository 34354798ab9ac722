//! Replaces the running `/usr` by an overlay or a bind mount in one step, and removes the mount again.
//!
//! * [`delta`]: the directory with the differences between the booted tree and the target.
//! * [`Base`]: the ways in which the new `/usr` replaces the booted one.
//! * [`DetachedTree`]: a mount tree that no process sees until it is exposed.
//! * [`Namespace`]: mounts and unmounts in the mount namespace of another process, normally PID 1's. The agent may be
//!   sandboxed, and mounts in its own namespace would have no effect on the system.
//! * [`trial()`]: runs programs in a private view of the new tree.
//!
//! The crate never decides whether to expose a tree. Outside of private mount namespaces it does not change mounts of other
//! programs.
//!
//! ```no_run
//! use std::path::Path;
//! # fn main() -> anyhow::Result<()> {
//! let (delta, usr) = (Path::new("/run/node-image-pivot/store/usr"), Path::new("/usr"));
//! let base = overlay_root::Base::Directory(usr.to_owned());
//! overlay_root::open_new_usr(delta, &base, "node-image:usr")?.expose(usr)?;
//! assert!(overlay_root::withdraw(usr, "node-image:usr")?);
//! # Ok(())
//! # }
//! ```

mod base;
mod bound;
pub mod delta;
mod image;
mod namespace;
mod table;
mod tmpfs;
mod tree;
mod trial;
mod view;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use base::Base;
pub use image::Composefs;
pub use namespace::Namespace;
pub use table::{
    Exposure, Mount, exposure, holding, is_data_overlay, is_extended, mounted_on, mounts_below, overlay_stack, parse,
    requires_verity, top, writable_overlay,
};
pub use tmpfs::{tmpfs, tmpfs_label, tmpfs_used};
pub use tree::{DetachedTree, overlay_support};
pub use trial::{Trial, run, trial};
pub use view::{with_writable, writable_view};

use std::path::Path;

use anyhow::{Context, Result};

/// Returns true if a mount named `source` is at `target` in PID 1's namespace, even if another mount covers it.
pub fn exposed(target: &Path, source: &str) -> Result<bool> {
    Ok(Namespace::init().exposure(target, source)? != Exposure::Absent)
}

/// Unmounts the mount named `source` from `target` in PID 1's namespace. See [`Namespace::withdraw`].
pub fn withdraw(target: &Path, source: &str) -> Result<bool> {
    Namespace::init().withdraw(target, source)
}

/// Builds the new `/usr` as a detached tree: the delta over the booted `/usr`, or the complete tree beside the delta.
///
/// The caller makes sure that no tree is exposed at the directory in `base`. Otherwise the new tree would be
/// stacked on that tree.
///
/// # Errors
/// Those of [`DetachedTree::overlay`]; the image cannot be mounted.
pub fn open_new_usr(delta: &Path, base: &Base, source: &str) -> Result<DetachedTree> {
    DetachedTree::of(base.recipe(delta, source), source).context("cannot build the new /usr")
}
