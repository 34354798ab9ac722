//! Merges all sources of the configuration. Later sources win; each value has its source, for messages.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use boot_config::TARGET_VARIABLE;
use boot_config::cmdline::CommandLine;
use boot_config::dropin;
use boot_config::search::Search;
use boot_config::target::{DefaultTarget, FALLBACK_TARGET, Origin, default_target};
use toml::{Table, Value};

use super::fragment::Fragment;
use super::{AUTH_CREDENTIAL, Environment};

/// The auth file that cluster installers write. Used only if it exists.
const INSTALLER_AUTH_FILE: &str = "/root/.docker/config.json";

/// Keys that exclude each other: a source that has either replaces both.
const IMAGES: [&str; 2] = ["image", "release_image"];

/// The source of a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Source {
    /// A drop-in file.
    #[error("{0}")]
    File(PathBuf),
    /// The kernel command line.
    #[error("kernel command line")]
    CommandLine,
    /// A systemd credential.
    #[error("credential {AUTH_CREDENTIAL}")]
    Credential,
    /// The environment that the generator set.
    #[error("environment variable {TARGET_VARIABLE}")]
    Environment,
    /// A file or link of this machine, used because no other source has a value.
    #[error("this machine")]
    Machine,
}

/// The merged configuration, unchecked.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// The values of all sources, as if they were in one file.
    values: Table,
    /// The source of each value, by its key, such as `retry.initial`.
    sources: BTreeMap<String, Source>,
}

impl Inputs {
    /// Returns a line for each value, with its source.
    pub(super) fn lines(&self) -> Vec<String> {
        let value = |key: &str| match key.split_once('.') {
            Some((table, key)) => self.values.get(table)?.get(key),
            None => self.values.get(key),
        };
        let line = |(key, source): (&String, &Source)| Some(format!("{key} = {} ({source})", value(key)?));
        self.sources.iter().filter_map(line).collect()
    }

    /// Returns the values.
    pub(super) fn values(&self) -> Result<Fragment> {
        self.values.clone().try_into().context("internal error: the merged configuration is invalid")
    }

    /// Checks the value of a key, if there is one. An error begins with source and key.
    pub(super) fn checked<I, T>(
        &self,
        key: &str,
        input: Option<I>,
        check: impl FnOnce(I) -> Result<T>,
    ) -> Result<Option<T>> {
        let source = || self.sources.get(key).map_or_else(String::new, |source| format!("{source}: "));
        input.map(check).transpose().with_context(|| format!("{}{key}", source()))
    }

    /// Merges drop-in files in order of their priority.
    pub(super) fn of_files(files: &[dropin::Fragment]) -> Result<Self> {
        files.iter().try_fold(Self::default(), |mut inputs, file| {
            // An error of this type names file, line and key. The table has only the keys that the file sets.
            Fragment::parse(&file.path, &file.text)?;
            inputs.add(toml::from_str(&file.text)?, &Source::File(file.path.clone()))?;
            Ok(inputs)
        })
    }

    /// Applies the kernel command line, which overrides all files.
    pub(super) fn apply_command_line(&mut self, line: &CommandLine) -> Result<()> {
        let CommandLine { image, release_image, mode, target, .. } = line;
        let words = [("image", image), ("release_image", release_image), ("mode", mode), ("target", target)];
        let given = |(key, word): (&str, &Option<String>)| Some((key.to_owned(), word.clone()?.into()));
        self.add(words.into_iter().filter_map(given).collect(), &Source::CommandLine)
    }

    /// Sets the auth file, if no source has one, from the systemd credential or the installer's file. `exists` tells if a
    /// path of the machine exists.
    pub(super) fn apply_environment(&mut self, environment: &Environment, exists: &dyn Fn(&Path) -> bool) {
        let credential = environment.credentials_directory.as_ref().map(|directory| directory.join(AUTH_CREDENTIAL));
        let installer = Some(INSTALLER_AUTH_FILE.into());
        for (path, source) in [(credential, Source::Credential), (installer, Source::Machine)] {
            if let Some(path) = path.filter(|path| exists(path)) {
                self.set_default("auth_file", path.to_string_lossy().into_owned(), source);
            }
        }
    }

    /// Sets the target, if no source has one, to the default target that the machine would have booted into. The agent's
    /// generator runs in parallel with others, so a redirect by another generator overrides the target that it recorded.
    pub(super) fn apply_default_target(&mut self, environment: &Environment, root: &Path) {
        let found = default_target(&Search::complete(root));
        let (name, source) = match (found.target, &environment.original_target) {
            (DefaultTarget::Name(name), _) if found.origin == Origin::Generator => (name, Source::Machine),
            (_, Some(original)) => (original.clone(), Source::Environment),
            (DefaultTarget::Name(name), None) => (name, Source::Machine),
            (DefaultTarget::Masked, None) => (FALLBACK_TARGET.to_owned(), Source::Machine),
        };
        self.set_default("target", name, source);
    }

    /// Sets a value if no source has one.
    fn set_default(&mut self, key: &str, text: String, source: Source) {
        if !self.values.contains_key(key) {
            self.values.insert(key.to_owned(), text.into());
            self.sources.insert(key.to_owned(), source);
        }
    }

    /// Adds the values of a source. They replace those of earlier sources. An empty image removes the earlier value.
    fn add(&mut self, values: Table, source: &Source) -> Result<()> {
        let image = |key: &str| values.get(key).filter(|value| value.as_str() != Some(""));
        ensure!(
            !IMAGES.iter().all(|key| image(key).is_some()),
            "{source}: both image and release_image are set; remove one"
        );
        if IMAGES.iter().any(|key| values.contains_key(*key)) {
            for key in IMAGES {
                self.values.remove(key);
                self.sources.remove(key);
            }
        }
        for (key, value) in values {
            match value {
                Value::String(text) if text.is_empty() && IMAGES.contains(&key.as_str()) => {}
                Value::Table(new) => {
                    self.sources.extend(new.keys().map(|inner| (format!("{key}.{inner}"), source.clone())));
                    match self.values.get_mut(&key) {
                        Some(Value::Table(old)) => old.extend(new),
                        _ => drop(self.values.insert(key, new.into())),
                    }
                }
                value => {
                    self.sources.insert(key.clone(), source.clone());
                    self.values.insert(key, value);
                }
            }
        }
        Ok(())
    }
}
