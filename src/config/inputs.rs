//! Merges all sources of the configuration. Later sources win; each value has its source, for messages.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use boot_config::TARGET_VARIABLE;
use boot_config::cmdline::CommandLine;
use boot_config::dropin;
use boot_config::search::Search;
use boot_config::target::{DefaultTarget, FALLBACK_TARGET, Origin, default_target};

use super::fragment::{Fragment, RamLimitText};
use super::{AUTH_CREDENTIAL, Environment};
use node_store::image::PullSpec;
use serde::{Serialize, Serializer};
use serde_json::Value;

/// The auth file that cluster installers write. Used only if it exists.
const INSTALLER_AUTH_FILE: &str = "/root/.docker/config.json";

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

/// A value and its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Sourced<T> {
    /// The value.
    pub value: T,
    /// Its source.
    #[serde(serialize_with = "shown")]
    pub source: Source,
}

/// The source of the node image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageSource<T = PullSpec> {
    /// The node image itself.
    Image(T),
    /// A release payload that names it.
    Release(T),
}

impl<T> ImageSource<T> {
    /// Returns the pull spec of the image or the payload.
    pub fn spec(&self) -> &T {
        match self {
            Self::Image(spec) | Self::Release(spec) => spec,
        }
    }
}

/// The merged configuration, unchecked. `None` if no source has a value.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub(super) struct Inputs {
    pub image: Option<Sourced<ImageSource<String>>>,
    pub image_tags: Option<Sourced<Vec<String>>>,
    pub os_mismatch: Option<Sourced<String>>,
    pub mode: Option<Sourced<String>>,
    pub target: Option<Sourced<String>>,
    pub probe_paths: Option<Sourced<Vec<PathBuf>>>,
    pub auth_file: Option<Sourced<PathBuf>>,
    pub ram_limit: Option<Sourced<String>>,
    pub complete: Option<Sourced<bool>>,
    pub store: Option<Sourced<String>>,
    pub retry_initial: Option<Sourced<f64>>,
    pub retry_maximum: Option<Sourced<f64>>,
    pub retry_attempts: Option<Sourced<u32>>,
    pub retry_denied: Option<Sourced<f64>>,
    pub retry_unknown: Option<Sourced<f64>>,
    pub etc_strategy: Option<Sourced<String>>,
    pub hooks_timeout: Option<Sourced<f64>>,
    pub units: BTreeMap<String, Sourced<String>>,
}

fn shown<S: Serializer>(source: &Source, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(source)
}

/// Replaces the value in `place` by `value` if that is given.
fn set<T>(place: &mut Option<Sourced<T>>, value: Option<T>, source: &Source) {
    if let Some(value) = value {
        *place = Some(Sourced { value, source: source.clone() });
    }
}

impl Inputs {
    /// Returns a line for each value, with its source.
    pub(super) fn lines(&self) -> Vec<String> {
        let line = |name: &str, sourced: &Value| {
            let source = sourced["source"].as_str().unwrap_or_default();
            format!("{name} = {} ({source})", sourced["value"])
        };
        let Ok(Value::Object(fields)) = serde_json::to_value(self) else { return Vec::new() };
        let mut lines = Vec::new();
        for (name, field) in &fields {
            match (name.as_str(), field) {
                ("units", Value::Object(units)) => {
                    lines.extend(units.iter().map(|(unit, sourced)| line(&format!("units.{unit:?}"), sourced)));
                }
                (_, Value::Null) => {}
                _ => lines.push(line(name, field)),
            }
        }
        lines
    }

    /// Merges drop-in files in order of their priority.
    pub(super) fn of_files(files: &[dropin::Fragment]) -> Result<Self> {
        files.iter().try_fold(Self::default(), |mut inputs, file| {
            inputs.apply_fragment(&file.path, Fragment::parse(&file.path, &file.text)?)?;
            Ok(inputs)
        })
    }

    /// Applies a drop-in file. Its values replace earlier ones.
    pub(super) fn apply_fragment(&mut self, path: &Path, fragment: Fragment) -> Result<()> {
        let source = &Source::File(path.to_owned());
        self.apply_image(fragment.image, fragment.release_image, source)?;
        set(&mut self.image_tags, fragment.image_tags, source);
        set(&mut self.os_mismatch, fragment.os_mismatch, source);
        set(&mut self.mode, fragment.mode, source);
        set(&mut self.target, fragment.target, source);
        set(&mut self.probe_paths, fragment.probe_paths, source);
        set(&mut self.auth_file, fragment.auth_file, source);
        let ram_limit = fragment.ram_limit.map(|limit| match limit {
            RamLimitText::Bytes(bytes) => bytes.to_string(),
            RamLimitText::Text(text) => text,
        });
        set(&mut self.ram_limit, ram_limit, source);
        set(&mut self.complete, fragment.complete, source);
        set(&mut self.store, fragment.store, source);
        set(&mut self.retry_initial, fragment.retry.initial, source);
        set(&mut self.retry_maximum, fragment.retry.maximum, source);
        set(&mut self.retry_attempts, fragment.retry.attempts, source);
        set(&mut self.retry_denied, fragment.retry.denied, source);
        set(&mut self.retry_unknown, fragment.retry.unknown, source);
        set(&mut self.etc_strategy, fragment.etc.strategy, source);
        set(&mut self.hooks_timeout, fragment.hooks.timeout, source);
        for (pattern, value) in fragment.units {
            self.units.insert(pattern, Sourced { value, source: source.clone() });
        }
        Ok(())
    }

    /// Applies the kernel command line, which overrides all files.
    pub(super) fn apply_command_line(&mut self, line: &CommandLine) -> Result<()> {
        let source = &Source::CommandLine;
        self.apply_image(line.image.clone(), line.release_image.clone(), source)?;
        set(&mut self.mode, line.mode.clone(), source);
        set(&mut self.target, line.target.clone(), source);
        Ok(())
    }

    /// Sets the auth file, if no source has one, from the systemd credential or the installer's file. `exists` tells if a
    /// path of the machine exists.
    pub(super) fn apply_environment(&mut self, environment: &Environment, exists: &dyn Fn(&Path) -> bool) {
        if self.auth_file.is_none() {
            let credential =
                environment.credentials_directory.as_ref().map(|directory| directory.join(AUTH_CREDENTIAL));
            set(&mut self.auth_file, credential.filter(|path| exists(path)), &Source::Credential);
        }
        if self.auth_file.is_none() {
            let path = PathBuf::from(INSTALLER_AUTH_FILE);
            set(&mut self.auth_file, Some(path).filter(|path| exists(path)), &Source::Machine);
        }
    }

    /// Sets the target, if no source has one, to the default target that the machine would have booted into. The agent's
    /// generator runs in parallel with others, so a redirect by another generator overrides the target that it recorded.
    pub(super) fn apply_default_target(&mut self, environment: &Environment, root: &Path) {
        if self.target.is_none() {
            let found = default_target(&Search::complete(root));
            let (name, source) = match (found.target, &environment.original_target) {
                (DefaultTarget::Name(name), _) if found.origin == Origin::Generator => (name, Source::Machine),
                (_, Some(original)) => (original.clone(), Source::Environment),
                (DefaultTarget::Name(name), None) => (name, Source::Machine),
                (DefaultTarget::Masked, None) => (FALLBACK_TARGET.to_owned(), Source::Machine),
            };
            set(&mut self.target, Some(name), &source);
        }
    }

    /// Applies `image` and `release_image`, which exclude each other: a source that has either replaces both. An empty text
    /// removes the value of an earlier source.
    fn apply_image(&mut self, image: Option<String>, release: Option<String>, source: &Source) -> Result<()> {
        if image.is_none() && release.is_none() {
            return Ok(());
        }
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        let value = match (given(image), given(release)) {
            (Some(_), Some(_)) => bail!("{source}: both image and release_image are set; remove one"),
            (Some(image), None) => Some(ImageSource::Image(image)),
            (None, Some(release)) => Some(ImageSource::Release(release)),
            (None, None) => None,
        };
        self.image = value.map(|value| Sourced { value, source: source.clone() });
        Ok(())
    }
}
