//! The delta tree: a directory with the differences between the booted `/usr` and the target's, for an overlay on the
//! booted one.
//!
//! [`compare()`] compares the two trees, and [`Difference::build`] writes the directory. [`complete()`] is for machines on which
//! no overlay can be mounted: the directory then holds all of the new `/usr`. This module does not mount.

mod build;
mod compare;
mod keep;
mod lookup;
mod outside;
mod overlay_marks;
mod source;
mod write;

#[cfg(test)]
mod tests;

pub use build::{Booted, Difference, compare, complete};
pub use keep::Keep;
pub use lookup::{Delta, DeltaCounts, DeltaLookup};
pub use outside::outside_usr;
