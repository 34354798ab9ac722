//! Reads the configuration from drop-in files, the kernel command line and credentials into [`Settings`].
//!
//! A `Fragment` is one file as written. `Inputs` are all sources merged, each value with its source. [`Settings`] are
//! complete and checked. The crate `boot-config`, which the generator also uses, selects the files and splits the command
//! line, so that generator and agent agree. `docs/configuration.md` describes the keys.

mod fragment;
mod inputs;
mod settings;
#[cfg(test)]
mod tests;

pub use boot_config::Mode;
pub use settings::{EtcStrategy, ImageSource, Registry, Retry, Settings, StoreSettings};

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use boot_config::TARGET_VARIABLE;
use boot_config::cmdline::CommandLine;
use boot_config::{dropin, under};

use inputs::Inputs;

/// The credential that holds a registry auth file.
pub const AUTH_CREDENTIAL: &str = "node-image-pivot.auth";

/// Environment variables of the process that are configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Environment {
    /// `$CREDENTIALS_DIRECTORY`, set by systemd for `LoadCredential=`.
    credentials_directory: Option<PathBuf>,
    /// `$NODE_IMAGE_PIVOT_TARGET`, set by the generator's drop-in: the original default target.
    original_target: Option<String>,
}

impl Environment {
    /// Returns the environment of this process.
    fn of_this_process() -> Self {
        Self {
            credentials_directory: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
            original_target: std::env::var(TARGET_VARIABLE).ok().filter(|value| !value.is_empty()),
        }
    }
}

impl Settings {
    /// Returns the settings of this machine and process.
    ///
    /// # Errors
    /// A source cannot be read, or has an unknown key or an invalid value. The message names the file and the key.
    pub fn load() -> Result<Self> {
        let root = Path::new("/");
        Self::load_with(root, &CommandLine::read(root)?, &Environment::of_this_process())
    }

    /// Returns the settings that drop-in files alone give, in order of their priority.
    ///
    /// # Errors
    /// Fails as [`Settings::load`].
    pub fn of_files(files: &[dropin::Fragment]) -> Result<Self> {
        Settings::validate(&Inputs::of_files(files)?)
    }

    /// Returns a line for each value that a source of this machine sets, with the source. All others have their defaults.
    ///
    /// # Errors
    /// As [`Settings::load`], except for invalid values.
    pub fn configured() -> Result<Vec<String>> {
        let root = Path::new("/");
        Ok(Self::inputs(root, &CommandLine::read(root)?, &Environment::of_this_process())?.lines())
    }

    fn load_with(root: &Path, line: &CommandLine, environment: &Environment) -> Result<Self> {
        Settings::validate(&Self::inputs(root, line, environment)?)
    }

    fn inputs(root: &Path, line: &CommandLine, environment: &Environment) -> Result<Inputs> {
        let mut inputs = Inputs::of_files(&dropin::fragments(root)?)?;
        ensure!(
            line.unknown.is_empty(),
            "kernel command line: unknown key {}: expected node-image-pivot, node-image-pivot.image, \
             node-image-pivot.release-image or node-image-pivot.target",
            line.unknown.join(", ")
        );
        inputs.apply_command_line(line)?;
        inputs.apply_environment(environment, &|path| under(root, path).exists());
        inputs.apply_default_target(environment, root);
        Ok(inputs)
    }
}
