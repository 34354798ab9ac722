//! What the generator and the agent read by the same rules: the kernel command line, drop-in files, unit files on disk, the
//! default target, and the marks below `/run` that one leaves for the other.
//!
//! Nothing here knows ostree, D-Bus or the network: a generator runs before all of them, and its time is added to every
//! boot and every daemon-reload.

pub mod cmdline;
pub mod dropin;
pub mod mark;
mod mode;
pub mod preset;
pub mod search;
pub mod services;
pub mod target;

pub use mode::{DEFAULT_PROBE_PATHS, Mode};

/// The variable that hands the original default target to the agent.
pub const TARGET_VARIABLE: &str = "NODE_IMAGE_PIVOT_TARGET";

/// Something that cannot be read or understood. The text names the thing and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem(pub String);

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Problem {}

/// Joins an absolute path of the machine to `root`, the prefix that tests put in front of it.
pub fn under(root: &std::path::Path, path: impl AsRef<std::path::Path>) -> std::path::PathBuf {
    let path = path.as_ref();
    root.join(path.strip_prefix("/").unwrap_or(path))
}
