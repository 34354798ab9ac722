//! The node store and what fills it: ostree objects, repos and locks ([`store`]); pull specs, manifests, layers and
//! the failures of registries ([`image`]); the import of layers as objects ([`import`]).
//!
//! The crate writes to the node store only. It mounts nothing, retries nothing, and does not know the running system's
//! `/usr` or `/etc`, or the phases of a pivot.

pub mod image;
pub mod import;
mod progress;
pub mod store;

pub use progress::{ProgressSnapshot, PullProgress};
