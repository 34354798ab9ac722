//! The directory of the agent's state.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use support::directory::Directory;

/// A directory on `/run`, so that a reboot discards the state. `file.rs` loads and saves its state files.
#[derive(Debug, Clone)]
pub struct StateDir {
    run: PathBuf,
}

impl Default for StateDir {
    fn default() -> Self {
        Self { run: "/run/node-image-pivot".into() }
    }
}

impl StateDir {
    /// Mark of a switch, which keeps the generator from arming the pivot again at a reload.
    pub const PIVOTED: &str = "pivoted";
    /// File that the generator creates when it redirects a boot. As long as it exists, the generator redirects at every
    /// reload.
    pub const REDIRECTED: &str = "redirected";
    /// Directory with a file for each unit that is held back. As long as the file exists, systemd does not start the unit.
    pub const HELD: &str = "held-units";

    /// Returns the paths below another directory.
    #[cfg(test)]
    pub(crate) fn below(run: &Path) -> Self {
        Self { run: run.to_owned() }
    }

    /// Returns the directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Returns the mount point of the RAM store, which holds objects and the delta tree hard linked to them.
    pub fn store(&self) -> PathBuf {
        self.run.join("store")
    }

    /// Returns the directory of the undo record of `/etc`.
    pub fn etc_undo(&self) -> PathBuf {
        self.run.join("etc-undo")
    }

    /// Creates the directory if it is missing.
    ///
    /// # Errors
    /// It cannot be created or opened.
    pub fn open(&self) -> Result<Directory> {
        Directory::ensure(&self.run).with_context(|| format!("cannot use {}", self.run.display()))
    }

    /// Replaces the file `name` in one step.
    ///
    /// # Errors
    /// The old file is unchanged.
    pub fn write(&self, name: &str, mode: u32, text: &[u8]) -> Result<()> {
        let written = self.open()?.write_atomic(name, mode, text);
        written.with_context(|| format!("cannot write {}", self.run.join(name).display()))
    }

    /// Removes the file `name`. A missing file is not an error.
    ///
    /// # Errors
    /// The file stays.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.open()?.remove_all(name).with_context(|| format!("cannot remove {}", self.run.join(name).display()))
    }

    /// Returns the lock that the daemon holds as long as it lives, because two daemons would switch twice.
    pub fn lock(&self) -> PathBuf {
        self.run.join("daemon.lock")
    }

    /// Returns the private socket of the daemon.
    pub fn socket(&self) -> PathBuf {
        self.run.join("socket")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boot_config::mark;

    #[test]
    fn the_generator_has_the_same_marks() {
        assert_eq!(StateDir::default().run().join(StateDir::PIVOTED), Path::new(mark::PIVOTED));
        assert_eq!(StateDir::default().run().join(StateDir::REDIRECTED), Path::new(mark::REDIRECTED));
    }
}
