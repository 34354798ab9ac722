//! From a pulled commit to a `/usr` that is ready to be switched to, with nothing switched yet.
//!
//! This room compares the target's tree with the booted one ([`diff()`], pure), builds the directory
//! that holds only the difference ([`build_delta`]), and checks everything that can be checked
//! beforehand ([`check_system`], [`check_content`], [`check_runs`], [`Free`]). It reads the store and
//! writes the delta directory. It may not expose a mount, touch `/etc`, talk to a registry or to systemd.

mod build;
mod delta;
mod diff;
mod elf;
mod keep;
mod labels;
mod memory;
mod outside;
mod overlay_marks;
mod packages;
mod preflight;
mod selinux;
mod source;
mod sshd;
mod trial;

#[cfg(test)]
mod tests;

pub use build::{Booted, Difference, ObjectPath, build_delta, compare};
pub use delta::{Delta, DeltaCounts, DeltaLookup};
pub use diff::{Checksum, DeltaOp, Directory, Hidden, Listing, Tree, diff};
pub use elf::Machine;
pub use keep::Keep;
pub use labels::label_plan;
pub use memory::{Free, Memory, Need, store_limit};
pub use outside::outside_usr;
pub use packages::{DPKG_STATUS, Package, PackageChange, PackageChanges, Packages, dpkg, rpm};
pub use preflight::{Refusal, Refusals, check_content, check_metadata, check_system, warnings};
pub use selinux::check_selinux;
pub use trial::{TrialReport, check_runs};

use std::path::Path;

use anyhow::{Context, Result};

use crate::mount::DetachedTree;

/// The new `/usr`, built but seen by nobody: the delta over the booted `/usr`.
///
/// Call it only while the booted `/usr` is what `booted_usr` shows: once a tree is exposed there,
/// the next one would lie on top of it.
pub fn open_new_usr(delta: &Path, booted_usr: &Path, source: &str) -> Result<DetachedTree> {
    DetachedTree::overlay(&[delta, booted_usr], source).context("cannot build the new /usr")
}
