//! Packs the agent for machines whose image does not contain it: as an archive that is appended to the initramfs of a
//! stock medium ([`initramfs`], [`archive`]), or as a fragment for Ignition ([`ignition`]).
//!
//! [`Parts`] are the inputs. The files of both forms, their paths and modes are functions of them, so equal parts give
//! equal bytes.

mod archive;
mod entry;
mod files;
mod ignition;
mod initramfs;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use boot_config::{dropin, under};

use crate::config::Settings;
use crate::preflight::{Machine, machine_of};

pub use archive::{archive, write_tree};
pub use ignition::{Binaries, Spec, ignition};
pub use initramfs::initramfs;

/// File name of the generator.
const GENERATOR: &str = "node-image-pivot-generator";
/// Directory of installed generators below `/usr`.
const GENERATORS: &str = "lib/systemd/system-generators";

/// The parts of a package that are not built into this program.
#[derive(Debug)]
pub struct Parts {
    /// The agent's program.
    agent: Vec<u8>,
    /// The generator's program.
    generator: Vec<u8>,
    /// Machine that both programs are built for.
    pub machine: Machine,
    /// Names and texts of drop-in files.
    config: Vec<(String, String)>,
    /// True if the drop-in files name a node image.
    pub names_image: bool,
    /// The registry auth file.
    auth: Option<Vec<u8>>,
}

impl Parts {
    /// Reads the parts. `root` is the root of an installation; without it, the agent is this program.
    ///
    /// # Errors
    /// A part is missing or cannot be read, the programs are of different machines, or the configuration or the auth
    /// file is invalid.
    pub fn read(root: Option<&Path>, config: Option<&Path>, auth: Option<&Path>) -> Result<Self> {
        let (agent, generator) = match root {
            Some(root) => {
                (under(root, "/usr/bin/node-image-pivot"), under(root, "/usr").join(GENERATORS).join(GENERATOR))
            }
            None => ("/proc/self/exe".into(), generator_beside(&std::env::current_exe()?)?),
        };
        let (agent, of_agent) = program(&agent)?;
        let (generator, of_generator) = program(&generator)?;
        ensure!(
            of_agent == of_generator,
            "cannot pack programs of different machines: the agent is for {of_agent}, the generator for {of_generator}"
        );
        let files = config.map(drop_ins).transpose()?.unwrap_or_default();
        let names_image = Settings::of_files(&files)?.image.is_some();
        let auth = auth.map(auth_file).transpose()?;
        let config = files.into_iter().map(|file| (name(&file.path), file.text)).collect();
        Ok(Self { agent, generator, machine: of_agent, config, names_image, auth })
    }

    /// Returns true if the parts contain secrets.
    pub fn has_secrets(&self) -> bool {
        self.auth.is_some()
    }
}

/// Returns the generator that belongs to the agent at `program`: in the same directory, as cargo builds it and an
/// initramfs carries it, or installed under the same prefix.
fn generator_beside(program: &Path) -> Result<PathBuf> {
    let directory = program.parent().unwrap_or(Path::new("/"));
    let prefix = directory.parent().unwrap_or(directory);
    let places = [directory.join(GENERATOR), prefix.join(GENERATORS).join(GENERATOR)];
    places.iter().find(|place| place.is_file()).cloned().ok_or_else(|| {
        let places: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
        anyhow!(
            "cannot find the generator: {} do not exist; build it with `cargo build --release -p {GENERATOR}`, or name \
             the root of an installation with --root",
            places.join(", ")
        )
    })
}

/// Reads a program and the machine that it is built for.
fn program(path: &Path) -> Result<(Vec<u8>, Machine)> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let machine =
        machine_of(&content).with_context(|| format!("cannot pack {}: not an ELF program", path.display()))?;
    Ok((content, machine))
}

/// Reads the drop-in files of a directory.
fn drop_ins(directory: &Path) -> Result<Vec<dropin::Fragment>> {
    let directory = fs::canonicalize(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let files = dropin::fragments_in(&directory)?;
    ensure!(!files.is_empty(), "cannot pack {}: it has no *.toml file", directory.display());
    Ok(files)
}

/// Reads a registry auth file.
fn auth_file(path: &Path) -> Result<Vec<u8>> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match serde_json::from_slice::<serde_json::Value>(&content) {
        Ok(value) if value.get("auths").is_some_and(serde_json::Value::is_object) => Ok(content),
        Ok(_) => bail!("cannot pack {}: expected containers-auth.json(5) with the object \"auths\"", path.display()),
        Err(error) => Err(error).with_context(|| format!("cannot pack {}: expected JSON", path.display())),
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
impl Parts {
    /// Parts with short programs, of this machine.
    fn example(config: &[(&str, &str)], auth: Option<&str>) -> Self {
        Self {
            agent: b"agent".to_vec(),
            generator: b"generator".to_vec(),
            machine: Machine::here().expect("this program is an ELF file"),
            config: config.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
            names_image: false,
            auth: auth.map(|text| text.as_bytes().to_vec()),
        }
    }
}
