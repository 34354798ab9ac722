//! Layer streams into ostree objects.
//!
//! This room reads the layers of an encapsulated image, stores the commit's metadata and those content
//! objects that the booted repo lacks, lays plain layers on top over it into a commit of their own
//! (labelled by the image's SELinux policy), and points the node image's ref at it. It decides which
//! layers are fetched, in which order, and when enough has come. It writes to the node store only
//! (through [`crate::store`]); it never touches the running system's `/usr` or `/etc` and never
//! retries: retries are the agent's.
//!
//! Memory: about 10 MiB of buffers per layer in flight, some 150 bytes per object, and some 600 bytes per file in
//! plain layers. The cap is 150 MiB resident, whatever the image: [`budget`] refuses plain layers whose entries
//! would exceed it together. `tests/pull/memory.rs` and `tests/pull/shapes.rs` hold the importer to it.

mod budget;
mod encapsulated;
mod fetch;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod plain;
mod plain_layers;
mod pull;
mod room;
mod run;
mod state;
mod tree;
mod wanted;

pub use pull::{PullOptions, PulledImage, pull};
