//! Finds the units of a cluster installer in `/etc`, which hide the agent's units of the same names.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use boot_config::search::{Found, Search};
use boot_config::under;

/// Directory of the installer's units.
const UNITS: &str = "/etc/systemd/system";

/// The installer's generator, which redirects the boot to its own target.
const GENERATOR: &str = "/etc/systemd/system-generators/node-image-overlay-generator";

/// The unit that decides if all units are the installer's.
const PULL: &str = "node-image-pull.service";

/// The script that the installer's [`PULL`] runs.
const SCRIPT: &str = "/usr/local/bin/node-image-pull.sh";

/// Units that the installer and the agent both have.
const SHARED: [&str; 3] = [PULL, "node-image-overlay.service", "node-image-finish.service"];

/// The installer's files of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installer {
    /// The agent's files of the units that the installer's files hide.
    pub hidden: Vec<PathBuf>,
    /// True if the installer redirects the boot by its own generator. Otherwise it starts the units later.
    pub redirects: bool,
}

impl Installer {
    /// Finds the installer's units. Returns `None` if there are none. A copy of the agent's unit that an administrator has
    /// edited, and a mask, are not the installer's.
    pub fn find(root: &Path) -> Option<Self> {
        let text = fs::read_to_string(under(root, UNITS).join(PULL)).ok()?;
        if !runs_script(&text) {
            return None;
        }
        let (etc, agent) = (Search::configured(root, &[]), Search::hidden_by_etc(root));
        let hidden = |name: &str| match (etc.find(name), agent.find(name)) {
            (Found::File(theirs), Found::File(ours)) if theirs.starts_with(UNITS) => Some(ours),
            _ => None,
        };
        Some(Self {
            hidden: SHARED.into_iter().filter_map(hidden).collect(),
            // systemd runs executable files only.
            redirects: fs::metadata(under(root, GENERATOR))
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0),
        })
    }
}

/// Returns true if the unit file executes [`SCRIPT`].
fn runs_script(text: &str) -> bool {
    let commands = text.lines().filter_map(|line| line.trim().strip_prefix("ExecStart="));
    commands.flat_map(str::split_whitespace).any(|word| word.trim_start_matches(['-', '+', '@', ':', '!']) == SCRIPT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_that_run_the_script_are_the_installers() {
        for (text, expected) in [
            ("[Service]\nExecStart=/usr/local/bin/node-image-pull.sh\n", true),
            ("[Service]\nExecStart=-/usr/local/bin/node-image-pull.sh --debug\n", true),
            ("[Service]\n ExecStart=/usr/bin/bash /usr/local/bin/node-image-pull.sh\n", true),
            ("[Service]\nExecStart=/usr/bin/node-image-pivot pull\n", false),
            ("[Service]\n#ExecStart=/usr/local/bin/node-image-pull.sh\n", false),
            ("[Service]\nExecStartPre=chcon --reference=/usr/bin/ostree /usr/local/bin/node-image-pull.sh\n", false),
            ("", false),
        ] {
            assert_eq!(runs_script(text), expected, "{text}");
        }
    }
}
