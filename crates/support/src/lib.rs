//! What every other crate of the workspace may use: failpoints, handles of the agent's own directories, child
//! processes, extended attributes, name patterns and sizes for people.
//!
//! It knows nothing of images, ostree, systemd or the pivot, and depends on no other crate of the workspace.

pub mod command;
pub mod directory;
pub mod failpoint;
pub mod pattern;
mod size;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod xattr;

pub use size::human_bytes;
