//! Checked settings: complete, in units that cannot be misread.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use boot_config::target;
use boot_config::{DEFAULT_PROBE_PATHS, Mode};

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

/// Longer delays are a mistake in the unit.
const LONGEST_DELAY: f64 = 86_400.0;

/// Everything the agent has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What to pivot to; `None` when nothing is configured (yet).
    pub image: Option<ImageSource>,
    /// Names of the node image in a release payload, in order of preference. `None` leaves the choice to the installer's
    /// script and the booted system.
    pub image_tags: Option<Vec<String>>,
    /// Whether to pivot.
    pub mode: Mode,
    /// The target to isolate to in the end: a valid name, not our own.
    pub target: String,
    /// Absolute paths; one that exists says that this is no base-only system.
    pub probe_paths: Vec<PathBuf>,
    /// Registry auth file. `None` leaves the search to containers-auth.json(5).
    pub auth_file: Option<PathBuf>,
    /// How large the RAM store may grow.
    pub ram_limit: RamLimit,
    /// Whether a pull fetches all of the node image, also what the pivot does not need (kernel modules).
    pub complete: bool,
    /// Where the node image is stored.
    pub store: Wish,
    /// How transient failures are retried.
    pub retry: Retry,
    /// What to do about conflicts in `/etc`.
    pub etc_strategy: EtcStrategy,
    /// How long one hook may take.
    pub hooks_timeout: Duration,
    /// What to do about units that change.
    pub units: Policy,
}

/// An upper bound for the RAM store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamLimit {
    /// Of the machine's memory: 1 to 95.
    Percent(u8),
    /// Bytes, not 0.
    Bytes(u64),
}

impl RamLimit {
    /// The limit in bytes on a machine with `total` bytes of memory; never more than that.
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

/// How transient failures are retried: the delay doubles from `initial` up to `maximum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Before the second attempt.
    pub initial: Duration,
    /// Never longer than this; `initial` is not more.
    pub maximum: Duration,
    /// Give up after so many attempts; 0 is never.
    pub attempts: u32,
    /// Time over which an answer that is mostly final (401, 403, 404) is confirmed; zero for at once.
    pub denied: Duration,
    /// Time for which failures are retried that the agent does not know.
    pub unknown: Duration,
}

impl Retry {
    /// How long to wait after `failed` attempts (1 or more); `None` to give up.
    ///
    /// `jitter`, from 0 to 1, takes off up to a quarter, so that machines that were started together
    /// do not ask together.
    pub fn delay_after(&self, failed: u32, jitter: f64) -> Option<Duration> {
        if self.attempts != 0 && failed >= self.attempts {
            return None;
        }
        let doubled = self.initial.saturating_mul(1 << failed.saturating_sub(1).min(30));
        Some(doubled.min(self.maximum).mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0))
    }
}

/// What to do about a conflict in `/etc`: whatever machine and node image both changed, each in its own
/// way, be it a file's content or a file here and a directory there.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum EtcStrategy {
    /// The machine's own stays and is reported.
    #[default]
    Keep,
    /// The pivot is refused before the switch.
    Fail,
}

/// The checked value, or the default; the error gets source and key in front.
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
    /// Checks the merged inputs. The first thing that is wrong is the error, with its source, its
    /// key and what may be written instead.
    pub fn validate(inputs: Inputs) -> Result<Self> {
        Ok(Settings {
            image: inputs.image.map(|image| image.value),
            image_tags: checked("image_tags", inputs.image_tags, || None, |names| tags(names).map(Some))?,
            mode: checked("mode", inputs.mode, || Mode::Auto, |word| Ok(word.parse()?))?,
            target: checked(
                "target",
                inputs.target,
                || target::FALLBACK_TARGET.to_owned(),
                |name| target::check_name(&name).map_err(|why| anyhow!("\"{name}\" {why}")).map(|()| name),
            )?,
            probe_paths: checked(
                "probe_paths",
                inputs.probe_paths,
                || DEFAULT_PROBE_PATHS.map(PathBuf::from).to_vec(),
                |paths| paths.iter().try_for_each(|path| absolute(path)).map(|()| paths),
            )?,
            auth_file: checked("auth_file", inputs.auth_file, || None, |path| absolute(&path).map(|()| Some(path)))?,
            ram_limit: checked(
                "ram_limit",
                inputs.ram_limit,
                || DEFAULT_RAM_LIMIT,
                |text| {
                    RamLimit::parse(&text).ok_or_else(|| {
                        anyhow!("\"{text}\" is not a limit; write \"1%\" to \"95%\", a number of bytes, or one with KiB, MiB, GiB")
                    })
                },
            )?,
            complete: inputs.complete.is_some_and(|complete| complete.value),
            store: checked("store", inputs.store, Wish::default, |word| word.parse().map_err(|why| anyhow!("{why}")))?,
            retry: Retry {
                denied: checked("retry.denied", inputs.retry_denied, || DEFAULT_RETRY.denied, seconds_or_zero)?,
                unknown: checked("retry.unknown", inputs.retry_unknown, || DEFAULT_RETRY.unknown, seconds_or_zero)?,
                ..retry(inputs.retry_initial, inputs.retry_maximum, inputs.retry_attempts)?
            },
            etc_strategy: checked("etc.strategy", inputs.etc_strategy, EtcStrategy::default, |word| {
                match word.as_str() {
                    "keep" => Ok(EtcStrategy::Keep),
                    "fail" => Ok(EtcStrategy::Fail),
                    _ => Err(anyhow!("\"{word}\" is not a strategy; write keep or fail")),
                }
            })?,
            hooks_timeout: checked("hooks.timeout", inputs.hooks_timeout, || DEFAULT_HOOKS_TIMEOUT, seconds)?,
            units: units(&inputs.units)?,
        })
    }
}

fn units(rules: &BTreeMap<String, Sourced<String>>) -> Result<Policy> {
    for (pattern, Sourced { value, source }) in rules {
        Policy::new([(pattern.as_str(), value.as_str())]).with_context(|| format!("{source}: units"))?;
    }
    Policy::new(rules.iter().map(|(pattern, word)| (pattern.as_str(), word.value.as_str())))
}

fn tags(tags: Vec<String>) -> Result<Vec<String>> {
    ensure!(!tags.is_empty(), "the list is empty; leave the key out for the default");
    ensure!(tags.iter().all(|tag| !tag.trim().is_empty()), "an empty name in the list");
    Ok(tags)
}

fn absolute(path: &Path) -> Result<()> {
    ensure!(path.is_absolute(), "\"{}\" is not an absolute path", path.display());
    Ok(())
}

fn seconds(value: f64) -> Result<Duration> {
    ensure!(
        value > 0.0 && value <= LONGEST_DELAY,
        "{value} is not a duration; write seconds, above 0 and up to {LONGEST_DELAY}"
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
    // A maximum below the initial delay, given or by default, is meant as "never longer than this".
    let initial = initial.min(maximum);
    Ok(Retry { initial, maximum, attempts: attempts.map_or(0, |attempts| attempts.value), ..DEFAULT_RETRY })
}
