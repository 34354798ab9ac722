//! From a pulled commit to a `/usr` that is ready to be switched to, with nothing switched yet.
//!
//! This room compares the target's tree with the booted one ([`diff()`], pure), builds the directory
//! that holds only the difference ([`build_delta`]), and checks everything that can be checked
//! beforehand ([`check_system`], [`check_content`], [`check_runs`], [`Free`]). It reads the store and
//! writes the delta directory. It may not expose a mount, touch `/etc`, talk to a registry or to systemd.

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

pub use checks::{check_content, check_metadata, check_system, warnings};
pub use elf::Machine;
pub use labels::label_plan;
pub use memory::{Free, Memory, store_limit};
pub use packages::{DPKG_STATUS, Package, PackageChange, PackageChanges, Packages, dpkg, rpm};
pub use refusal::{Findings, Need, Refusal, Refusals};
pub use selinux::check_selinux;
pub use trial::check_runs;
