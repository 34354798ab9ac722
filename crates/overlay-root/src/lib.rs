//! Replaces the running `/usr` by an overlay in one step, and removes the overlay again.
//!
//! * [`delta`]: the directory with the differences between the booted tree and the target.
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
//! overlay_root::open_new_usr(delta, usr, "node-image:usr")?.expose(usr)?;
//! assert!(overlay_root::withdraw(usr, "node-image:usr")?);
//! # Ok(())
//! # }
//! ```

pub mod delta;
mod namespace;
mod table;
mod tmpfs;
mod tree;
mod trial;
mod view;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use namespace::Namespace;
pub use table::{
    Exposure, Mount, exposure, holding, mounted_on, mounts_below, overlay_stack, parse, top, writable_overlay,
};
pub use tmpfs::{tmpfs, tmpfs_label, tmpfs_used};
pub use tree::{DetachedTree, overlay_fits, overlay_support};
pub use trial::{Trial, run, trial};
pub use view::writable_view;

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

/// Builds the new `/usr` as a detached tree: the delta over the booted `/usr`.
///
/// The caller makes sure that no tree is exposed at `booted_usr`. Otherwise the new tree would be stacked on that tree.
///
/// # Errors
/// Those of [`DetachedTree::overlay`].
pub fn open_new_usr(delta: &Path, booted_usr: &Path, source: &str) -> Result<DetachedTree> {
    DetachedTree::overlay(&[delta, booted_usr], source).context("cannot build the new /usr")
}
