//! The phases, as readers know them.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

/// The phases, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, IntoStaticStr)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Phase {
    /// Resolves the pull spec to a digest.
    Resolve,
    /// Imports the layers as ostree objects.
    Pull,
    /// Builds the delta tree and the /etc plan, and runs the checks.
    Stage,
    /// Switches `/usr` by one `move_mount`, then `/etc`.
    Switch,
    /// Updates users, files and caches, and restarts PID 1 and units.
    Refresh,
    /// Isolates to the original default target.
    Finish,
    /// Writes the node image to a disk. Not part of the pivot.
    Deploy,
    /// A phase of another version of the agent.
    #[serde(other)]
    Other,
}

impl Phase {
    /// Returns its name in status document, journal and console.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
