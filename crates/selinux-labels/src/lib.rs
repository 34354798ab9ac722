//! SELinux labels: what the kernel says of its policy, which label a policy has for a path, and giving entries of a
//! running system the labels of another policy.
//!
//! The crate loads no policy and knows nothing of images or the pivot.

pub mod contexts;
mod kernel;
mod policy;
mod relabel;

pub use kernel::*;
pub use policy::{open_contexts, open_policy};
pub use relabel::{FileContexts, LABELLED, Relabelled};
