//! Checks the merged configuration and completes it with defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use boot_config::{DEFAULT_PROBE_PATHS, Mode, target};

use super::inputs::{ImageSource, Inputs, Sourced};
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
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum OsMismatch {
    /// The switch is refused, unless the configuration names the node image itself.
    #[default]
    Refuse,
    /// A warning is reported.
    Warn,
}

/// Treatment of a conflict in `/etc`: an entry that the machine and the node image changed differently.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum EtcStrategy {
    /// The machine's version stays and is reported.
    #[default]
    Keep,
    /// The switch is refused.
    Fail,
}

/// Returns the checked value, or the default if there is no input. An error begins with source and key.
fn checked<I, T>(
    key: &str,
    input: Option<Sourced<I>>,
    default: impl FnOnce() -> T,
    check: impl FnOnce(I) -> Result<T>,
) -> Result<T> {
    let Some(Sourced { value, source }) = input else { return Ok(default()) };
    check(value).with_context(|| format!("{source}: {key}"))
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
    pub(super) fn validate(inputs: Inputs) -> Result<Self> {
        Ok(Settings {
            image: inputs.image.map(image).transpose()?,
            image_tags: checked("image_tags", inputs.image_tags, || None, |names| tags(names).map(Some))?,
            os_mismatch: checked("os_mismatch", inputs.os_mismatch, OsMismatch::default, |word| match word.as_str() {
                "refuse" => Ok(OsMismatch::Refuse),
                "warn" => Ok(OsMismatch::Warn),
                _ => Err(anyhow!("unknown reaction \"{word}\": expected refuse or warn")),
            })?,
            mode: checked("mode", inputs.mode, || Mode::Auto, |word| Ok(word.parse()?))?,
            target: checked(
                "target",
                inputs.target,
                || target::FALLBACK_TARGET.to_owned(),
                |name| Ok(target::check_name(&name).map(|()| name)?),
            )?,
            probe_paths: checked(
                "probe_paths",
                inputs.probe_paths,
                || DEFAULT_PROBE_PATHS.map(PathBuf::from).to_vec(),
                |paths| paths.iter().try_for_each(|path| absolute(path)).map(|()| paths),
            )?,
            registry: Registry {
                auth_file: checked(
                    "auth_file",
                    inputs.auth_file,
                    || None,
                    |path| absolute(&path).map(|()| Some(path)),
                )?,
                retry: Retry {
                    denied: checked("retry.denied", inputs.retry_denied, || DEFAULT_RETRY.denied, seconds_or_zero)?,
                    unknown: checked("retry.unknown", inputs.retry_unknown, || DEFAULT_RETRY.unknown, seconds_or_zero)?,
                    ..retry(inputs.retry_initial, inputs.retry_maximum, inputs.retry_attempts)?
                },
            },
            complete: inputs.complete.is_some_and(|complete| complete.value),
            store: StoreSettings {
                place: checked("store", inputs.store, Wish::default, |word| {
                    word.parse().map_err(|why| anyhow!("{why}"))
                })?,
                ram_limit: checked(
                    "ram_limit",
                    inputs.ram_limit,
                    || DEFAULT_RAM_LIMIT,
                    |text| {
                        RamLimit::parse(&text).ok_or_else(|| {
                            anyhow!(
                                "invalid limit \"{text}\": expected 1% to 95%, or a size in bytes, KiB, MiB, GiB or TiB"
                            )
                        })
                    },
                )?,
            },
            etc_strategy: checked("etc.strategy", inputs.etc_strategy, EtcStrategy::default, |word| {
                match word.as_str() {
                    "keep" => Ok(EtcStrategy::Keep),
                    "fail" => Ok(EtcStrategy::Fail),
                    _ => Err(anyhow!("unknown strategy \"{word}\": expected keep or fail")),
                }
            })?,
            hooks_timeout: checked("hooks.timeout", inputs.hooks_timeout, || DEFAULT_HOOKS_TIMEOUT, seconds)?,
            units: units(&inputs.units)?,
        })
    }
}

fn image(Sourced { value, source }: Sourced<ImageSource<String>>) -> Result<ImageSource> {
    let parse = |key: &str, text: &str| text.parse().with_context(|| format!("{source}: {key}"));
    Ok(match &value {
        ImageSource::Image(text) => ImageSource::Image(parse("image", text)?),
        ImageSource::Release(text) => ImageSource::Release(parse("release_image", text)?),
    })
}

fn units(rules: &BTreeMap<String, Sourced<String>>) -> Result<Policy> {
    for (pattern, Sourced { value, source }) in rules {
        Policy::new([(pattern.as_str(), value.as_str())]).with_context(|| format!("{source}: units"))?;
    }
    Policy::new(rules.iter().map(|(pattern, word)| (pattern.as_str(), word.value.as_str())))
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

fn retry(
    initial: Option<Sourced<f64>>,
    maximum: Option<Sourced<f64>>,
    attempts: Option<Sourced<u32>>,
) -> Result<Retry> {
    let initial = checked("retry.initial", initial, || DEFAULT_RETRY.initial, seconds)?;
    let maximum = checked("retry.maximum", maximum, || DEFAULT_RETRY.maximum.max(initial), seconds)?;
    // The maximum also limits the initial delay.
    let initial = initial.min(maximum);
    Ok(Retry { initial, maximum, attempts: attempts.map_or(0, |attempts| attempts.value), ..DEFAULT_RETRY })
}
