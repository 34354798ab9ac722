//! Imports the layers of a node image as ostree objects.
//!
//! [`encapsulated`] reads the layers of an encapsulated commit: it stores the commit's metadata and the content objects
//! that the booted repo lacks. [`plain`] reads plain layers, merges them with their [`base`], labels the tree with the
//! image's SELinux policy and commits it. The base is the encapsulated commit or, for a plain image, the empty tree.
//! [`pull()`] decides which layers are fetched and in which order, and moves the ref of the node image. The module writes
//! to the node store only, through [`crate::store`]. It does not touch the running system's `/usr` or `/etc`, and it does
//! not retry: the agent does.
//!
//! Memory: about 10 MiB of buffers for each layer in flight, 150 bytes for each object, and 700 bytes for each file in
//! plain layers. [`budget`] refuses plain layers that list more entries than its limit allows. With the least limit, that of
//! a machine with 1.25 GiB of memory, resident memory stays below 170 MiB for every image. `tests/pull/memory.rs` and
//! `tests/pull/shapes.rs` check this.

mod base;
mod budget;
mod encapsulated;
mod fetch;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod image_refs;
mod plain;
mod plain_layers;
mod pull;
mod replaced;
mod run;
mod space;
mod state;
mod tree;
mod wanted;

pub use image_refs::has_image;
pub use pull::{PullOptions, PulledImage, pull};
