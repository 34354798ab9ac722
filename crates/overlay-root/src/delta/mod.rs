//! The delta tree: what differs between the booted `/usr` and the target's, as a directory to mount over the booted one.
//!
//! The target's tree is compared with the booted one ([`diff()`], pure); [`build_delta`] writes the directory. Nothing
//! here mounts.

mod build;
mod compare;
mod keep;
mod lookup;
mod outside;
mod overlay_marks;
mod source;

#[cfg(test)]
mod tests;

pub use build::{Booted, Difference, ObjectPath, build_delta, compare};
pub use compare::{Checksum, DeltaOp, Directory, Hidden, Listing, Tree, diff};
pub use keep::Keep;
pub use lookup::{Delta, DeltaCounts, DeltaLookup};
pub use outside::outside_usr;
