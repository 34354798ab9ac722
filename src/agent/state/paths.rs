//! Paths of the agent's state.

use std::path::{Path, PathBuf};

/// Paths below one directory on `/run`, so that a reboot discards the state.
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
    /// File with the plan for `/etc`, written before the first act.
    pub const ETC_PLAN: &str = "etc-plan.json";
    /// File with the plan of the switch, as `plan --json` prints it.
    pub const PLAN: &str = "plan.json";
    /// File with the hooks that ran after the switch, one per line.
    pub const HOOKS_DONE: &str = "hooks-done";
    /// See [`Paths::pivoted`].
    pub const PIVOTED: &str = "pivoted";
    /// File that the generator creates when it redirects a boot. As long as it exists, the generator redirects at every
    /// reload.
    pub const REDIRECTED: &str = "redirected";

    /// Returns the paths below another directory.
    #[cfg(test)]
    pub(in crate::agent) fn below(run: &Path) -> Self {
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

    /// Returns the mark of a switch, which keeps the generator from arming the pivot again at a reload.
    pub fn pivoted(&self) -> PathBuf {
        self.run.join(Self::PIVOTED)
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
        assert_eq!(Paths::default().pivoted(), Path::new(mark::PIVOTED));
        assert_eq!(Paths::default().run().join(Paths::REDIRECTED), Path::new(mark::REDIRECTED));
    }
}
