//! Configuration: drop-in files, the kernel command line and credentials become [`Settings`].
//!
//! Three types, one direction. A [`fragment::Fragment`] is one file as written; [`Inputs`] are all
//! sources merged, every value with where it came from; [`Settings`] are complete and checked. The
//! rules for which files count and how the command line is split are the generator's, so that the two
//! cannot disagree. This room reads; it changes nothing and talks to nobody.
//!
//! `docs/configuration.md` describes the keys.

mod fragment;
mod inputs;
mod settings;
pub mod shipped;
#[cfg(test)]
mod tests;

pub use boot_config::Mode;
pub use inputs::{ImageSource, Inputs, Source, Sourced};
pub use settings::{EtcStrategy, RamLimit, Retry, Settings};

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use boot_config::TARGET_VARIABLE;
use boot_config::cmdline::CommandLine;
use boot_config::{dropin, under};

/// The credential that holds a registry auth file.
pub const AUTH_CREDENTIAL: &str = "node-image-pivot.auth";

/// What the process was started with, as far as it is configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `$CREDENTIALS_DIRECTORY`, set by systemd for `LoadCredential=`.
    pub credentials_directory: Option<PathBuf>,
    /// `$NODE_IMAGE_PIVOT_TARGET`, set by the generator's drop-in: the original default target.
    pub original_target: Option<String>,
}

impl Environment {
    /// This process's own.
    pub fn of_this_process() -> Self {
        Self {
            credentials_directory: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
            original_target: std::env::var(TARGET_VARIABLE).ok().filter(|value| !value.is_empty()),
        }
    }
}

impl Settings {
    /// The settings of this machine and process.
    ///
    /// Fails, naming the file or the key, on anything that cannot be read or understood: a misspelt
    /// key that is ignored costs more time than one that is refused.
    pub fn load() -> Result<Self> {
        let root = Path::new("/");
        Self::load_with(root, &CommandLine::read(root)?, &Environment::of_this_process())
    }

    /// The settings of the system below `root` with this kernel command line, and nothing from the
    /// environment. Paths in the result are the machine's own, without `root`.
    pub fn load_from(root: &Path, cmdline: &str) -> Result<Self> {
        Self::load_with(root, &CommandLine::parse(cmdline), &Environment::default())
    }

    /// The general form of [`Settings::load`] and [`Settings::load_from`].
    pub fn load_with(root: &Path, line: &CommandLine, environment: &Environment) -> Result<Self> {
        let mut inputs = Inputs::default();
        for file in dropin::fragments(root)? {
            let fragment = fragment::Fragment::parse(&file.path, &file.text)?;
            inputs.apply_fragment(&file.path, fragment)?;
        }
        ensure!(
            line.unknown.is_empty(),
            "kernel command line: unknown key {}; known are node-image-pivot and node-image-pivot.image, \
             .release-image, .target",
            line.unknown.join(", ")
        );
        inputs.apply_command_line(line)?;
        inputs.apply_environment(environment, &|path| under(root, path).exists());
        inputs.apply_default_target(environment, root);
        Settings::validate(inputs)
    }
}
