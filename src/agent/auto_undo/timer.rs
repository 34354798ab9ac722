//! A systemd timer that starts the agent at the end of a trial period if the agent has died.
//!
//! The timer only starts the agent, every 30 s until the agent removes the timer. The agent undoes the switch if its record
//! says so. A left-over timer, or one that elapses just after `keep`, is therefore harmless.
//!
//! Its files are below `/run`, which neither the new `/usr` nor a reload changes.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tracing::warn;

use super::trial::TrialPeriod;
use support::directory::Directory;
use support::if_found;
use unit_refresh::{Manager, Verb};

/// Directory of the files; systemd.unit(5).
const UNITS: &str = "/run/systemd/system";
const SERVICE: &str = "node-image-pivot-try.service";
/// Prefix and suffix of a timer's name. Each timer has a different name, because systemd does not read the file of a
/// loaded timer again.
const TIMER: (&str, &str) = ("node-image-pivot-try-", ".timer");
/// A hundred years in seconds, within the range of systemd's microseconds.
const LONGEST: u64 = 100 * 365 * 86400;
/// Time limit for a job of systemd.
const JOB: Duration = Duration::from_secs(30);

/// Resets the start limit first, because systemd does not start an agent that has died too often.
const SERVICE_FILE: &str = "[Unit]
Description=Bring Back the Agent of a Switch on Trial
Documentation=man:node-image-pivot(1)
IgnoreOnIsolate=yes

[Service]
Type=oneshot
# It is started every half minute for as long as an undo has to wait.
LogLevelMax=notice
ExecStart=-/usr/bin/systemctl reset-failed node-image-pivotd.service
ExecStart=/usr/bin/systemctl start node-image-pivotd.service
TimeoutStartSec=90s
";

/// The unit whose limits the service has, too: both only talk to systemd or the agent.
const CLIENT: &str = include_str!("../../../units/node-image-finish.service");

/// Returns the text of the service.
fn service_file() -> String {
    const FIRST: &str = "CapabilityBoundingSet=";
    let (_, limits) = CLIENT.split_once(FIRST).unwrap_or_default();
    format!("{SERVICE_FILE}{FIRST}{limits}")
}

fn timer_name(trial: TrialPeriod) -> String {
    format!("{}{}{}", TIMER.0, trial.until_boottime_ms, TIMER.1)
}

/// Returns the deadline of the timer that is armed, in milliseconds of the boot-time clock.
pub(in crate::agent) fn armed() -> Option<u64> {
    let entries = std::fs::read_dir(UNITS).ok()?;
    entries.flatten().filter_map(|entry| deadline_of(entry.file_name().to_str()?)).min()
}

fn deadline_of(timer: &str) -> Option<u64> {
    timer.strip_prefix(TIMER.0)?.strip_suffix(TIMER.1)?.parse().ok()
}

fn is_timer(name: &str) -> bool {
    name.starts_with(TIMER.0) && name.ends_with(TIMER.1)
}

/// Returns the text of a timer that elapses `left` after its start, rounded up to seconds.
fn timer_file(left: Duration) -> String {
    let seconds = left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0)).min(LONGEST);
    format!(
        "[Unit]
Description=End of a Switch on Trial
Documentation=man:node-image-pivot(1)
IgnoreOnIsolate=yes

[Timer]
OnActiveSec={seconds}s
OnUnitInactiveSec=30s
AccuracySec=1s
Unit={SERVICE}
"
    )
}

/// Starts the timer for `trial`.
///
/// # Errors
/// Its files cannot be written, or systemd does not start it. No timer runs then.
pub(in crate::agent) async fn arm(trial: TrialPeriod) -> anyhow::Result<()> {
    let Some(left) = trial.left() else { return Ok(()) };
    let name = timer_name(trial);
    let start = async {
        let dir = Directory::ensure(Path::new(UNITS))?;
        dir.write_atomic(SERVICE, 0o644, service_file().as_bytes())
            .with_context(|| format!("cannot write {UNITS}/{SERVICE}"))?;
        dir.write_atomic(&name, 0o644, timer_file(left).as_bytes())
            .with_context(|| format!("cannot write {UNITS}/{name}"))?;
        Manager::connect().await?.run(Verb::Start, &name, JOB).await
    };
    let started = start.await.context("cannot start the timer that ends the trial period");
    if started.is_err() {
        disarm().await;
    }
    started
}

/// Stops every timer of a trial period and removes the files. Logs a failure: a left-over file is harmless.
pub(in crate::agent) async fn disarm() {
    if let Err(error) = try_disarm().await {
        warn!("a timer of the trial period is left over, which is harmless: {error:#}");
    }
}

async fn try_disarm() -> anyhow::Result<()> {
    let entries = if_found(std::fs::read_dir(UNITS)).with_context(|| format!("cannot list {UNITS}"))?;
    let Some(entries) = entries else { return Ok(()) };
    let names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let dir = Directory::ensure(Path::new(UNITS))?;
    for name in names.iter().filter(|name| is_timer(name)) {
        Manager::connect().await?.run(Verb::Stop, name, JOB).await?;
        dir.remove_all(name).with_context(|| format!("cannot remove {UNITS}/{name}"))?;
    }
    if names.iter().any(|name| name == SERVICE) {
        dir.remove_all(SERVICE).with_context(|| format!("cannot remove {UNITS}/{SERVICE}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_have_distinct_names_and_round_up() {
        let name = timer_name(TrialPeriod { until_boottime_ms: 4711, kept: false });
        assert_eq!(name, "node-image-pivot-try-4711.timer");
        assert!(is_timer(&name));
        assert_eq!(deadline_of(&name), Some(4711));
        assert_eq!(deadline_of(SERVICE), None);
        for other in [SERVICE, "node-image-pivot.target", "node-image-pivot-try-4711.service", "try.timer"] {
            assert!(!is_timer(other), "{other}");
        }
        // Never before the deadline, when the agent would not undo yet.
        assert!(timer_file(Duration::from_millis(8001)).contains("OnActiveSec=9s\n"));
        assert!(timer_file(Duration::from_secs(8)).contains("OnActiveSec=8s\n"));
        assert!(timer_file(Duration::MAX).contains(&format!("OnActiveSec={LONGEST}s\n")));
    }

    #[test]
    fn the_service_has_the_limits_of_a_client() {
        let text = service_file();
        for line in ["TimeoutStartSec=90s", "LockPersonality=yes", "RestrictRealtime=yes"] {
            assert!(text.lines().any(|present| present == line), "{line}:\n{text}");
        }
    }
}
