//! Jobs of PID 1: start, stop, reload, restart, isolate.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use zbus::message::Type;
use zbus::{MessageStream, OwnedObjectPath};

use super::manager::Lost;
use super::{Manager, Verb};
use support::failpoint::{self, Point};

/// Number of attempts to request a job if the connection breaks.
const ATTEMPTS: usize = 5;

impl Manager {
    /// Time limit for the job of one unit, after which the caller continues without it. Longer than the 90 s that systemd
    /// waits by default until it kills a unit that does not stop.
    pub const JOB_TIMEOUT: Duration = Duration::from_secs(100);

    /// Runs one job, and waits at most `limit` for its end. If another process re-executes systemd in the meantime, the job
    /// is requested again, which is safe because these jobs may run twice.
    ///
    /// # Errors
    /// Fails if systemd refuses the job, or if the job fails or exceeds `limit`. In the last case the job continues.
    pub async fn run(&mut self, verb: Verb, unit: &str, limit: Duration) -> Result<()> {
        for _ in 0..ATTEMPTS {
            match self.job(verb.method(), unit, limit).await {
                Err(error) if Self::is_lost(&error) => *self = Self::connect().await?,
                // A unit that is not loaded is stopped.
                Err(error) if verb == Verb::Stop => return not_loaded(error),
                done => return done,
            }
        }
        bail!("{unit}: systemd closed the connection {ATTEMPTS} times")
    }

    async fn job(&self, method: &'static str, unit: &str, limit: Duration) -> Result<()> {
        failpoint::hit(Point::Systemd, method).with_context(|| format!("{method} {unit}"))?;
        // The stream is opened before the job is queued, so that the signal of its end cannot be missed.
        let mut signals = MessageStream::from(&self.connection);
        self.call("Subscribe", &()).await.map(drop).or_else(already_subscribed)?;
        let reply = self.call(method, &(unit, "replace")).await.with_context(|| format!("{method} {unit}"))?;
        let job: OwnedObjectPath = reply.body().deserialize().context("cannot decode the job path of systemd")?;
        let ended = async {
            while let Some(message) = signals.next().await {
                let message = message?;
                let header = message.header();
                if header.message_type() != Type::Signal || header.member().is_none_or(|name| name != "JobRemoved") {
                    continue;
                }
                let (_, path, _, result): (u32, OwnedObjectPath, String, String) = message.body().deserialize()?;
                if path == job {
                    return Ok(result);
                }
            }
            Err(Lost.into())
        };
        match tokio::time::timeout(limit, ended).await {
            Err(_) => bail!(
                "{unit}: job still running after {} s, continuing without it; see systemctl list-jobs and systemctl status \
                 {unit}",
                limit.as_secs()
            ),
            Ok(Err(error)) => Err(error),
            Ok(Ok(result)) if matches!(result.as_str(), "done" | "skipped") => Ok(()),
            Ok(Ok(result)) => bail!("{unit}: the job ended as {result}; see systemctl status {unit}"),
        }
    }

    /// Resets the failed state of `unit`. Does nothing if the unit is not loaded.
    pub async fn reset_failed(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "ResetFailed").with_context(|| format!("cannot reset {unit}"))?;
        self.call("ResetFailedUnit", &(unit,)).await.map(drop).or_else(not_loaded)
    }

    /// Isolates `target`. A target without `AllowIsolate=yes` is only started, as systemd itself does at boot. Returns when
    /// the job is queued, without waiting for its end: the job stops and starts units, which may include the caller.
    /// Returns true if the target is isolated.
    pub async fn isolate_or_start(&self, target: &str) -> Result<bool> {
        failpoint::hit(Point::Systemd, "Isolate").with_context(|| format!("cannot isolate {target}"))?;
        match self.call("StartUnit", &(target, "isolate")).await {
            Err(error) if is_named(&error, "NoIsolation") => {
                self.call("StartUnit", &(target, "replace")).await.map(|_| false)
            }
            isolated => isolated.map(|_| true),
        }
    }

    /// Re-executes the user manager `unit`, which keeps the units that it started. Does nothing if it is not loaded.
    pub async fn reexecute_user(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "KillUnit").with_context(|| format!("cannot re-execute {unit}"))?;
        // systemd(1): user managers re-execute themselves on SIGRTMIN+25.
        let signal = nix::libc::SIGRTMIN() + 25;
        self.call("KillUnit", &(unit, "main", signal)).await.map(drop).or_else(not_loaded)
    }
}

/// Returns true if systemd refused a call with the error `name`.
fn is_named(error: &anyhow::Error, name: &str) -> bool {
    match error.downcast_ref() {
        Some(zbus::Error::MethodError(error, ..)) => error.rsplit('.').next() == Some(name),
        _ => false,
    }
}

/// Accepts the error for a unit that is not loaded.
pub(super) fn not_loaded(error: anyhow::Error) -> Result<()> {
    if is_named(&error, "NoSuchUnit") { Ok(()) } else { Err(error) }
}

/// Accepts the error that a second `Subscribe` on the private socket returns.
fn already_subscribed(error: anyhow::Error) -> Result<()> {
    if is_named(&error, "AlreadySubscribed") { Ok(()) } else { Err(error) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::manager::PATH;
    use super::*;

    #[test]
    fn errors_for_a_state_already_reached_are_not_failures() {
        let answer = |name: &str| {
            let call = zbus::Message::method_call(PATH, "X").build(&()).unwrap();
            let name = format!("org.freedesktop.systemd1.{name}").try_into().unwrap();
            anyhow::Error::from(zbus::Error::MethodError(name, None, call)).context("systemd refused X")
        };
        assert!(not_loaded(answer("NoSuchUnit")).is_ok() && already_subscribed(answer("AlreadySubscribed")).is_ok());
        assert!(not_loaded(answer("UnitMasked")).is_err() && already_subscribed(answer("AccessDenied")).is_err());
        assert!(not_loaded(anyhow::anyhow!("x")).is_err() && already_subscribed(anyhow::anyhow!("x")).is_err());
    }
}
