//! Where the agent keeps what it must remember.

use std::path::{Path, PathBuf};

/// Everything is below one directory on `/run`: volatile, so that a reboot forgets the pivot.
#[derive(Debug, Clone)]
pub struct Paths {
    run: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { run: "/run/node-image-pivot".into() }
    }
}

impl Paths {
    /// The plan for `/etc`, written before the first act; a file of the directory.
    pub const ETC_PLAN: &str = "etc-plan.json";
    /// The plan of the switch for a person, likewise.
    pub const PLAN: &str = "plan.json";
    /// Which hooks ran after the switch, one name a line.
    pub const HOOKS_DONE: &str = "hooks-done";
    /// See [`Paths::pivoted`].
    pub const PIVOTED: &str = "pivoted";
    /// Made by the generator when it redirects a boot. As long as it exists, the generator does so at every reload.
    pub const REDIRECTED: &str = "redirected";

    /// The same below another directory.
    #[cfg(test)]
    pub(in crate::agent) fn below(run: &Path) -> Self {
        Self { run: run.to_owned() }
    }

    /// The directory itself.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The RAM store's tmpfs: objects, and the delta tree that is hardlinked to them.
    pub fn store(&self) -> PathBuf {
        self.run.join("store")
    }

    /// The undo record of `/etc`.
    pub fn etc_undo(&self) -> PathBuf {
        self.run.join("etc-undo")
    }

    /// Exists from the switch on: the generator sees it at every reload and never re-arms.
    pub fn pivoted(&self) -> PathBuf {
        self.run.join(Self::PIVOTED)
    }

    /// Held by the daemon as long as it lives: two would switch twice.
    pub fn lock(&self) -> PathBuf {
        self.run.join("daemon.lock")
    }

    /// The private socket of the daemon.
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
        assert_eq!(Paths::default().pivoted(), Path::new(mark::PIVOTED));
        assert_eq!(Paths::default().run().join(Paths::REDIRECTED), Path::new(mark::REDIRECTED));
    }
}
