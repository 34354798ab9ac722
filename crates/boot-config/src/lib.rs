//! Inputs that the generator and the agent must read by the same rules: the kernel command line, drop-in files, unit files
//! on disk, the default target, and the marks below `/run` that one of them writes for the other.
//!
//! The crate does not use ostree, D-Bus or the network: a generator runs before all of them, and its time is added to every
//! boot and every daemon-reload.
//!
//! ```
//! use boot_config::cmdline::CommandLine;
//!
//! let line = CommandLine::parse("quiet node-image-pivot.image=registry.example.com/node:1 rescue");
//! assert_eq!(line.image.as_deref(), Some("registry.example.com/node:1"));
//! assert_eq!(line.unit.as_deref(), Some("rescue.target"));
//! ```

pub mod cmdline;
pub mod dropin;
pub mod mark;
mod mode;
pub mod preset;
pub mod search;
pub mod services;
pub mod target;

pub use mode::{DEFAULT_PROBE_PATHS, Mode};

/// Environment variable with which the generator passes the original default target to the agent.
pub const TARGET_VARIABLE: &str = "NODE_IMAGE_PIVOT_TARGET";

/// Error for an input that cannot be read or parsed. The text names the input, the cause and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Problem(pub String);

/// Joins an absolute path of the machine to `root`, which is `/` except in tests.
pub fn under(root: &std::path::Path, path: impl AsRef<std::path::Path>) -> std::path::PathBuf {
    let path = path.as_ref();
    root.join(path.strip_prefix("/").unwrap_or(path))
}
