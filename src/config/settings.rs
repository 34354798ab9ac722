//! Checks the merged configuration and completes it with defaults.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use boot_config::{DEFAULT_PROBE_PATHS, Mode, target};
use serde::{Deserialize, Serialize};

use super::fragment::{RamLimitText, RetryTable};
use super::inputs::Inputs;
use node_store::image::PullSpec;
use node_store::store::Wish;
use unit_refresh::Policy;

const DEFAULT_RAM_LIMIT: RamLimit = RamLimit::Percent(60);
const DEFAULT_RETRY: Retry = Retry {
    initial: Duration::from_secs(2),
    maximum: Duration::from_secs(60),
    attempts: 0,
    denied: Duration::from_secs(120),
    unknown: Duration::from_secs(1800),
};

const DEFAULT_HOOKS_TIMEOUT: Duration = Duration::from_secs(120);

/// Maximum of a duration, in seconds. A longer one is probably in the wrong unit.
const LONGEST_DELAY: f64 = 86_400.0;

/// The source of the node image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageSource {
    /// The node image itself.
    Image(PullSpec),
    /// A release payload that names it.
    Release(PullSpec),
}

impl ImageSource {
    /// Returns the pull spec of the image or the payload.
    pub fn spec(&self) -> &PullSpec {
        match self {
            Self::Image(spec) | Self::Release(spec) => spec,
        }
    }
}

/// The checked configuration of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Source of the node image; `None` if it is not configured.
    pub image: Option<ImageSource>,
    /// Names of the node image in a release payload, in order of preference. `None` leaves the choice to the installer's
    /// script and the booted system.
    pub image_tags: Option<Vec<String>>,
    /// Reaction to a node image of another system.
    pub os_mismatch: OsMismatch,
    /// Condition for the pivot.
    pub mode: Mode,
    /// Target to isolate to in the finish phase: a valid name, and not the agent's own target.
    pub target: String,
    /// Absolute paths. If one of them exists, the system is not base-only.
    pub probe_paths: Vec<PathBuf>,
    /// Access to the registry.
    pub registry: Registry,
    /// True if a pull also fetches the objects that the pivot does not need (kernel modules).
    pub complete: bool,
    /// The node store.
    pub store: StoreSettings,
    /// Treatment of conflicts in `/etc`.
    pub etc_strategy: EtcStrategy,
    /// Time limit for one hook.
    pub hooks_timeout: Duration,
    /// Rules for units that change.
    pub units: Policy,
}

/// Access to the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// Registry auth file. `None` leaves the search to containers-auth.json(5).
    pub auth_file: Option<PathBuf>,
    /// Retries of transient failures.
    pub retry: Retry,
}

/// Place and size of the node store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreSettings {
    /// Place.
    pub place: Wish,
    /// Size limit, if the place is RAM.
    pub ram_limit: RamLimit,
}

/// An upper bound for the RAM store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamLimit {
    /// Percent of the machine's memory, from 1 to 95.
    Percent(u8),
    /// Bytes, not 0.
    Bytes(u64),
}

impl RamLimit {
    /// Returns the limit in bytes on a machine with `total` bytes of memory, at most `total`.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            RamLimit::Percent(percent) => (u128::from(total) * u128::from(percent) / 100) as u64,
            RamLimit::Bytes(bytes) => bytes.min(total),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if let Some(percent) = text.strip_suffix('%') {
            return percent.trim_end().parse().ok().filter(|percent| (1..=95).contains(percent)).map(RamLimit::Percent);
        }
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim_start() {
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return None,
        };
        let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
        (bytes > 0).then_some(RamLimit::Bytes(bytes))
    }
}

/// Retries of transient failures. The delay doubles from `initial` up to `maximum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Delay before the second attempt.
    pub initial: Duration,
    /// Maximum of the delay, at least `initial`.
    pub maximum: Duration,
    /// Maximum number of attempts; 0 for no limit.
    pub attempts: u32,
    /// Time for which 401, 403 and 404 are retried before they count as permanent; zero for no retry.
    pub denied: Duration,
    /// Time for which a failure of unknown class is retried.
    pub unknown: Duration,
}

impl Retry {
    /// Returns the delay after `failed` attempts (1 or more), or `None` to give up.
    ///
    /// `jitter`, from 0 to 1, shortens the delay by up to a quarter, so that machines that were started together do not
    /// retry at the same time.
    pub fn delay_after(&self, failed: u32, jitter: f64) -> Option<Duration> {
        if self.attempts != 0 && failed >= self.attempts {
            return None;
        }
        let doubled = self.initial.saturating_mul(1 << failed.saturating_sub(1).min(30));
        Some(doubled.min(self.maximum).mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0))
    }
}

/// Reaction to a node image of another distribution or major release than the booted system.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown_reaction)]
pub enum OsMismatch {
    /// The switch is refused, unless the configuration names the node image itself.
    #[default]
    Refuse,
    /// A warning is reported.
    Warn,
}

fn unknown_reaction(word: &str) -> String {
    format!("unknown reaction \"{word}\": expected refuse or warn")
}

/// Treatment of a conflict in `/etc`: an entry that the machine and the node image changed differently.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown_strategy)]
pub enum EtcStrategy {
    /// The machine's version stays and is reported.
    #[default]
    Keep,
    /// The switch is refused.
    Fail,
}

fn unknown_strategy(word: &str) -> String {
    format!("unknown strategy \"{word}\": expected keep or fail")
}

/// Parses one of the words of a key.
fn word<T: FromStr<Err: Display + Debug + Send + Sync + 'static>>(text: String) -> Result<T> {
    text.parse().map_err(Error::msg)
}

impl Settings {
    /// Returns true if the configuration permits a node image of another system: by `os_mismatch`, or because it names the
    /// image itself.
    pub fn permits_another_system(&self) -> bool {
        self.os_mismatch == OsMismatch::Warn || matches!(self.image, Some(ImageSource::Image(_)))
    }

    /// Checks the merged inputs.
    ///
    /// # Errors
    /// The first invalid value, with its source, its key and the expected values.
    pub(super) fn validate(inputs: &Inputs) -> Result<Self> {
        let values = inputs.values()?;
        let spec = |text: String| Ok(text.parse()?);
        let image = inputs.checked("image", values.image, spec)?.map(ImageSource::Image);
        let release = inputs.checked("release_image", values.release_image, spec)?.map(ImageSource::Release);
        let all_absolute = |paths: Vec<PathBuf>| paths.iter().try_for_each(|path| absolute(path)).map(|()| paths);
        let target = inputs.checked("target", values.target, |name| Ok(target::check_name(&name).map(|()| name)?))?;
        let probe_paths = inputs.checked("probe_paths", values.probe_paths, all_absolute)?;
        Ok(Settings {
            image: image.or(release),
            image_tags: inputs.checked("image_tags", values.image_tags, tags)?,
            os_mismatch: inputs.checked("os_mismatch", values.os_mismatch, word)?.unwrap_or_default(),
            mode: inputs.checked("mode", values.mode, word)?.unwrap_or_default(),
            target: target.unwrap_or_else(|| target::FALLBACK_TARGET.to_owned()),
            probe_paths: probe_paths.unwrap_or_else(|| DEFAULT_PROBE_PATHS.map(PathBuf::from).to_vec()),
            registry: Registry {
                auth_file: inputs.checked("auth_file", values.auth_file, |path| absolute(&path).map(|()| path))?,
                retry: retry(inputs, values.retry)?,
            },
            complete: values.complete.unwrap_or_default(),
            store: StoreSettings {
                place: inputs.checked("store", values.store, word)?.unwrap_or_default(),
                ram_limit: inputs.checked("ram_limit", values.ram_limit, ram_limit)?.unwrap_or(DEFAULT_RAM_LIMIT),
            },
            etc_strategy: inputs.checked("etc.strategy", values.etc.strategy, word)?.unwrap_or_default(),
            hooks_timeout: inputs
                .checked("hooks.timeout", values.hooks.timeout, seconds)?
                .unwrap_or(DEFAULT_HOOKS_TIMEOUT),
            units: units(inputs, &values.units)?,
        })
    }
}

fn ram_limit(limit: RamLimitText) -> Result<RamLimit> {
    let text = match limit {
        RamLimitText::Bytes(bytes) => bytes.to_string(),
        RamLimitText::Text(text) => text,
    };
    RamLimit::parse(&text).with_context(|| {
        format!("invalid limit \"{text}\": expected 1% to 95%, or a size in bytes, KiB, MiB, GiB or TiB")
    })
}

fn units(inputs: &Inputs, rules: &BTreeMap<String, String>) -> Result<Policy> {
    for rule in rules {
        inputs.checked(&format!("units.{}", rule.0), Some(rule), |(unit, word)| Policy::new([(&**unit, &**word)]))?;
    }
    Policy::new(rules.iter().map(|(pattern, word)| (pattern.as_str(), word.as_str())))
}

fn tags(tags: Vec<String>) -> Result<Vec<String>> {
    ensure!(!tags.is_empty(), "the list is empty; remove the key for the default");
    ensure!(tags.iter().all(|tag| !tag.trim().is_empty()), "the list has an empty name");
    Ok(tags)
}

fn absolute(path: &Path) -> Result<()> {
    ensure!(path.is_absolute(), "invalid path \"{}\": expected an absolute path", path.display());
    Ok(())
}

fn seconds(value: f64) -> Result<Duration> {
    ensure!(
        value > 0.0 && value <= LONGEST_DELAY,
        "invalid duration {value}: expected seconds, greater than 0 and at most {LONGEST_DELAY}"
    );
    Ok(Duration::from_secs_f64(value))
}

fn seconds_or_zero(value: f64) -> Result<Duration> {
    if value == 0.0 { Ok(Duration::ZERO) } else { seconds(value) }
}

fn retry(inputs: &Inputs, values: RetryTable) -> Result<Retry> {
    let checked = |key: &str, value, check: fn(f64) -> Result<Duration>| inputs.checked(key, value, check);
    let initial = checked("retry.initial", values.initial, seconds)?.unwrap_or(DEFAULT_RETRY.initial);
    let maximum = checked("retry.maximum", values.maximum, seconds)?;
    let maximum = maximum.unwrap_or_else(|| DEFAULT_RETRY.maximum.max(initial));
    Ok(Retry {
        // The maximum also limits the initial delay.
        initial: initial.min(maximum),
        maximum,
        attempts: values.attempts.unwrap_or(DEFAULT_RETRY.attempts),
        denied: checked("retry.denied", values.denied, seconds_or_zero)?.unwrap_or(DEFAULT_RETRY.denied),
        unknown: checked("retry.unknown", values.unknown, seconds_or_zero)?.unwrap_or(DEFAULT_RETRY.unknown),
    })
}
