//! The boot half of node-image-pivot: decides if this boot goes to `node-image-pivot.target` first.
//!
//! [`facts::gather`] reads the system, [`decide::decide`] is a pure function of what was read, and
//! [`emit::redirect`] writes the answer. The binary only glues the three together.
//!
//! [`cmdline`], [`dropin`], [`mark`], [`search`] and [`target`] are shared with the agent's configuration, so that both
//! sides read the same files by the same rules. Nothing here knows ostree, D-Bus or the network: a
//! generator runs before all of them, and its time is added to every boot and every daemon-reload.

pub mod cmdline;
pub mod decide;
pub mod dropin;
pub mod emit;
pub mod facts;
pub mod kmsg;
pub mod mark;
pub mod preset;
pub mod search;
pub mod services;
pub mod target;

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
