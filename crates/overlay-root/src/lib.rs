//! Mount trees: built detached, looked into, tried, exposed in one step, and taken away again.
//!
//! This room knows the kernel's mount API and mount namespaces, and nothing of images, ostree or
//! `/etc`. It never decides *whether* to expose something; outside of a trial's private namespace it may not
//! remount, bind or unmount anything that it did not mount itself.
//!
//! The namespace that counts is PID 1's ([`Namespace::init`]): the agent may be sandboxed, and what it
//! mounts in another namespace has no effect.

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
pub use tmpfs::{TmpfsUse, tmpfs, tmpfs_label, tmpfs_used};
pub use tree::{DetachedTree, overlay_fits, overlay_support};
pub use trial::{Ended, Trial, run, trial};
pub use view::writable_view;

use std::path::Path;

use anyhow::{Context, Result};

/// Returns true if a mount named `source` is at `target` in PID 1's namespace, on top or covered.
pub fn exposed(target: &Path, source: &str) -> Result<bool> {
    Ok(Namespace::init().exposure(target, source)? != Exposure::Absent)
}

/// Takes our mount `source` away from `target` in PID 1's namespace. See [`Namespace::withdraw`].
pub fn withdraw(target: &Path, source: &str) -> Result<bool> {
    Namespace::init().withdraw(target, source)
}

/// The new `/usr`, built but seen by nobody: the delta over the booted `/usr`.
///
/// Call it only while the booted `/usr` is what `booted_usr` shows: once a tree is exposed there,
/// the next one would lie on top of it.
pub fn open_new_usr(delta: &Path, booted_usr: &Path, source: &str) -> Result<DetachedTree> {
    DetachedTree::overlay(&[delta, booted_usr], source).context("cannot build the new /usr")
}
