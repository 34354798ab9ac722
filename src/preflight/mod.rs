//! Checks before the switch: the kernel and mounts ([`check_system`]), the commit ([`check_metadata`]), the new tree
//! ([`check_content`], [`check_selinux`], [`check_runs`]), and free memory and disk space ([`Free`]).
//!
//! The checks return refusals and warnings as values; the caller decides. The module also looks up SELinux labels for the
//! /etc plan ([`label_plan`]) and compares package lists ([`PackageChanges`]). It changes nothing of the running system:
//! the trial run uses a private mount namespace.

mod base;
mod checks;
mod elf;
mod labels;
mod memory;
mod packages;
mod refusal;
mod selinux;
mod sshd;
mod trial;

#[cfg(test)]
#[path = "tests/tree.rs"]
mod tests;

pub use base::{BaseChoice, estimate, warnings};
pub use checks::{check_content, check_local, check_metadata, check_same_system, check_system, open_in_usr};
pub use elf::{Machine, machine_of};
pub use labels::label_plan;
pub use memory::{Free, Memory, store_limit};
pub use packages::{DPKG_STATUS, PackageChanges, Packages, dpkg, rpm};
#[cfg(test)]
pub use packages::{Package, PackageChange};
pub use refusal::{Need, Refusal, Refusals};
pub use selinux::check_selinux;
pub use trial::check_runs;
