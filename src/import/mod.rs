//! Layer streams into ostree objects.
//!
//! This room reads the layers of an encapsulated image, stores the commit's metadata and those content
//! objects that the booted repo lacks, and points the node image's ref at the commit. It decides which
//! layers are fetched, in which order, and when enough has come. It writes to the node store only
//! (through [`crate::store`]); it never touches the running system's `/usr` or `/etc` and never
//! retries: retries are the agent's.
//!
//! What it costs: about 10 MiB of buffers per layer in flight, and some 150 bytes per object.

mod consume;
mod decompress;
mod entry;
mod fetch;
mod pull;
mod state;
mod tarstream;
mod tree;
mod wanted;

pub use pull::{PullOptions, PulledImage, pull};
