//! From a pulled commit to a `/usr` that is ready to be switched to, with nothing switched yet.
//!
//! This room compares the target's tree with the booted one ([`diff()`], pure), builds the directory
//! that holds only the difference ([`build_delta`]), and checks everything that can be checked
//! beforehand ([`check_system`], [`check_tree`]). It reads the store and writes the delta directory.
//! It may not expose a mount, touch `/etc`, talk to a registry or to systemd.

mod build;
mod delta;
mod diff;
mod keep;
mod preflight;
mod source;

#[cfg(test)]
mod tests;

pub use build::{Booted, ObjectPath, build_delta};
pub use delta::{Delta, DeltaCounts, DeltaLookup};
pub use diff::{Checksum, DeltaOp, Directory, Listing, Tree, diff};
pub use keep::Keep;
pub use preflight::{Refusal, Refusals, check_content, check_system, check_tree};

use std::path::Path;

use anyhow::{Context, Result};

use crate::mount::DetachedTree;

/// The new `/usr`, built but seen by nobody: the delta over the booted `/usr`.
///
/// Call it only while the booted `/usr` is what `booted_usr` shows: once a tree is exposed there,
/// the next one would lie on top of it.
pub fn open_new_usr(delta: &Path, booted_usr: &Path, source: &str) -> Result<DetachedTree> {
    DetachedTree::overlay(&[delta, booted_usr], source).context("building the new /usr; the running one is untouched")
}
