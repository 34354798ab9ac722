//! The command `pack`, which needs neither root nor the daemon.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use support::directory::Directory;
use support::human_bytes;

use super::say;
use crate::pack::{self, Binaries, Parts, Spec};
use crate::report::Outcome;

#[derive(Debug, Subcommand)]
pub(super) enum Form {
    /// Write an archive to append to an initramfs
    ///
    /// It carries the agent and its configuration into the real root. If the agent cannot run there, the boot continues
    /// without it, and the console shows the reason.
    Initrd {
        #[command(flatten)]
        content: Content,
        #[command(flatten)]
        destination: Destination,
    },
    /// Write a fragment for Ignition
    ///
    /// Merge it into another configuration with `ignition.config.merge`.
    Ignition {
        #[command(flatten)]
        content: Content,
        /// The file to write, or - for stdout
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// Let Ignition fetch the two programs from this directory
        ///
        /// Without it, the fragment contains them. With it, the fragment has their hashes: put the files
        /// node-image-pivot and node-image-pivot-generator into this directory, without changes.
        #[arg(long, value_name = "URL")]
        url: Option<String>,
        /// Version of the specification, for an older Ignition
        #[arg(long, value_name = "VERSION", default_value = "3.4.0")]
        spec: Spec,
    },
}

#[derive(Debug, Args)]
pub(super) struct Content {
    /// Directory with *.toml files of the agent's configuration
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
    /// Registry credentials, containers-auth.json(5)
    ///
    /// Only root can read them in the package, and the package itself.
    #[arg(long, value_name = "FILE")]
    auth: Option<PathBuf>,
    /// Root of an installation to pack, for example of another architecture
    ///
    /// Without it, this program is packed with the generator that is installed or was built with it.
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Destination {
    /// The file to write, or - for stdout
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the files of the archive into this directory instead
    ///
    /// For builders of an initramfs.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Packs the agent.
pub(super) fn pack(form: &Form) -> Result<Outcome> {
    match form {
        Form::Initrd { content, destination } => {
            let parts = content.parts()?;
            let tree = pack::initramfs(&parts);
            match &destination.directory {
                Some(directory) => pack::write_tree(&tree, directory)?,
                None => write(destination.output.as_deref().unwrap_or(Path::new("")), &pack::archive(&tree)?, &parts)?,
            }
        }
        Form::Ignition { content, output, url, spec } => {
            let parts = content.parts()?;
            let binaries = url.clone().map_or(Binaries::Inline, Binaries::Url);
            let fragment = pack::ignition(&parts, &binaries, *spec)?;
            write(output, format!("{fragment}\n").as_bytes(), &parts)?;
        }
    }
    Ok(Outcome::Done)
}

impl Content {
    fn parts(&self) -> Result<Parts> {
        Parts::read(self.root.as_deref(), self.config.as_deref(), self.auth.as_deref())
    }
}

/// Writes a package in one step. Only its owner can read it if it contains secrets.
fn write(path: &Path, content: &[u8], parts: &Parts) -> Result<()> {
    if path == Path::new("-") {
        return std::io::stdout().write_all(content).context("cannot write to stdout");
    }
    let place = std::path::absolute(path)?;
    let failed = || format!("cannot write {}", path.display());
    let (directory, name) = place.parent().zip(place.file_name()).with_context(failed)?;
    let mode = if parts.has_secrets() { 0o600 } else { 0o644 };
    let directory = Directory::ensure(directory).with_context(failed)?;
    directory.write_atomic(&name.to_string_lossy(), mode, content).with_context(failed)?;
    say::out(format_args!("wrote {}: {}, for {}", path.display(), human_bytes(content.len() as u64), parts.machine));
    if !parts.names_image {
        say::out("it names no node image: add one to the configuration or to the kernel command line");
    }
    Ok(())
}
