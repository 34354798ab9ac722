//! `daemon`: opens the agent with its record and serves calls until SIGTERM or SIGINT.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use libsystemd::daemon::{NotifyState, notify};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::drive::{unix_now, uptime};
use super::pauses::Pauses;
use crate::agent::{Agent, Boot, Program, StateDir};
use crate::report::{self, Diagnosis, Outcome, Phase, State, Status};
use crate::{bus, host};

/// Interval of the signs of life, which `WatchdogSec=` of the unit expects, and of the progress in `systemctl status`.
const BEAT: Duration = Duration::from_secs(5);

pub(super) async fn daemon(paths: StateDir) -> Result<Outcome> {
    start_log();
    let socket = paths.socket();
    let agent = Agent::open(paths, Boot::look().await)?;
    bus::serve(agent.clone(), &socket).await?;
    agent.attend();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _ = notify(false, &[NotifyState::Ready]);

    let mut watch = agent.tracker().watch();
    watch.mark_changed();
    let mut logins = Logins::default();
    let mut beat = tokio::time::interval(BEAT);
    let mut program = Program::of_this_process();
    let mut handing_over = None;
    info!("node-image-pivot {} is ready", env!("CARGO_PKG_VERSION"));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            changed = watch.changed() => {
                if changed.is_err() {
                    break;
                }
                let status = watch.borrow_and_update().clone();
                let _ = notify(false, &[NotifyState::Status(report::status_line(&status, unix_now()))]);
                logins.show(&status);
            }
            _ = beat.tick() => {
                let _ = notify(false, &[NotifyState::Watchdog]);
                // Calls that waited for a restart that systemd did not carry out go on.
                drop(handing_over.take());
                if let Some(program) = &mut program {
                    handing_over = agent.hand_over(program).await;
                }
                // The counters of a pull change without a change of the document.
                let status = agent.tracker().status();
                if (status.phase, status.state) == (Some(Phase::Pull), State::Running) {
                    let _ = notify(false, &[NotifyState::Status(report::status_line(&status, unix_now()))]);
                }
            }
        }
    }
    let _ = notify(false, &[NotifyState::Stopping]);
    if handing_over.is_some() {
        // Nothing runs. Without an answer, the callers repeat their calls to the next agent.
        return Ok(Outcome::Done);
    }
    // Waits for a running switch or undo. If it cannot be completed, the failure makes the unit start another daemon, which
    // completes it.
    let stopped = agent.stop().await;
    logins.end();
    Ok(if stopped.is_unfinished() { Outcome::Internal } else { Outcome::Done })
}

/// Class, phase and outcome of a diagnosis.
type Key = (String, Option<Phase>, Option<Outcome>);

/// The diagnosis that login prompts show. It changes only with its class, and ever more rarely between waits, because each
/// change shows the prompts again.
#[derive(Default)]
struct Logins {
    /// `None` within for nothing, or `None` if it is unknown: an earlier daemon may have died.
    shown: Option<Option<Key>>,
    pauses: Pauses,
}

impl Logins {
    fn show(&mut self, status: &Status) {
        if let Some(diagnosis) = self.next(status, uptime()) {
            Self::write(diagnosis.as_ref());
        }
    }

    /// Removes a wait at the end of the daemon, which does not make the next attempt.
    fn end(&self) {
        if self.is_wait() {
            Self::write(None);
        }
    }

    /// Returns true if the diagnosis is that of a pivot that waits.
    fn is_wait(&self) -> bool {
        matches!(self.shown, Some(Some((_, _, None))))
    }

    fn write(diagnosis: Option<&Diagnosis>) {
        let text = diagnosis.map(Diagnosis::banner);
        if let Err(error) = host::show_at_logins(Path::new("/"), text.as_deref()) {
            warn!("{error:#}");
        }
    }

    /// Returns the diagnosis to show, `None` within for nothing, or `None` if it is shown already.
    fn next(&mut self, status: &Status, uptime: u64) -> Option<Option<Diagnosis>> {
        let diagnosis = status.diagnose();
        // The cause of the last attempt stays while another one runs, and after a restart of the daemon.
        let stays = status.state == State::Running || (status.state == State::Idle && self.shown.is_none());
        if diagnosis.is_none() && status.error.is_some() && stays {
            return None;
        }
        let key = diagnosis.as_ref().map(|shown| (shown.class.clone(), shown.phase, shown.outcome));
        if self.shown.as_ref() == Some(&key) {
            return None;
        }
        if let Some((class, _, None)) = &key
            && !self.pauses.failure_is_due(class, uptime)
            && self.is_wait()
        {
            return None;
        }
        self.shown = Some(key);
        Some(diagnosis)
    }
}

/// Starts logging to the journal, or to stderr if there is no journal.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NODE_IMAGE_PIVOT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    match tracing_journald::layer() {
        Ok(journal) => {
            registry.with(journal.with_syslog_identifier("node-image-pivot".into()).with_field_prefix(None)).init();
        }
        Err(_) => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr)).init(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::LastError;

    #[test]
    fn login_prompts_change_only_with_the_diagnosis() {
        let of = |state, message: &str, next_retry_unix| {
            let error =
                LastError { class: "network".into(), message: message.into(), next_retry_unix, ..LastError::default() };
            Status { state, phase: Some(Phase::Pull), error: Some(error), ..Status::default() }
        };
        let mut logins = Logins::default();
        assert_eq!(logins.next(&Status::default(), 0), Some(None), "an earlier daemon may have shown a failure");
        assert_eq!(logins.next(&Status::default(), 0), None, "nothing to show");
        assert!(logins.next(&of(State::Waiting, "a", Some(1)), 0).unwrap().is_some());
        assert_eq!(logins.next(&of(State::Running, "a", Some(1)), 0), None, "another attempt");
        assert_eq!(logins.next(&of(State::Waiting, "b", Some(9)), 0), None, "the same class");
        assert!(logins.next(&of(State::Failed, "b", None), 0).unwrap().is_some());
        assert!(!logins.is_wait());
        assert_eq!(logins.next(&Status { state: State::Running, ..Status::default() }, 0), Some(None), "a success");
        assert!(logins.next(&of(State::Waiting, "a", Some(1)), 0).unwrap().is_some());
        assert!(logins.is_wait());
    }

    #[test]
    fn login_prompts_change_rarely_if_two_causes_alternate() {
        let mut logins = Logins::default();
        let wait = |class: &str| {
            let error = LastError { class: class.into(), next_retry_unix: Some(1), ..LastError::default() };
            Status { state: State::Waiting, error: Some(error), ..Status::default() }
        };
        let class = |second| ["network", "truncated"][second as usize / 5 % 2];
        let shown = (0..10_000).filter(|second| logins.next(&wait(class(*second)), *second).is_some()).count();
        assert!(shown <= 22, "{shown} changes");
        let failed = Status { state: State::Failed, ..wait("network") };
        assert!(logins.next(&failed, 10_000).is_some(), "a failure that is not retried is shown at once");
    }

    #[test]
    fn the_failure_that_an_earlier_daemon_showed_stays_until_a_success() {
        let mut logins = Logins::default();
        let mut status = Status { error: Some(LastError::default()), ..Status::default() };
        for state in [State::Idle, State::Running] {
            status.state = state;
            assert_eq!(logins.next(&status, 0), None, "{state:?}");
        }
        status.error = None;
        assert_eq!(logins.next(&status, 0), Some(None));
    }
}
