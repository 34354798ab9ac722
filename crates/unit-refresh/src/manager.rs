//! The D-Bus interface of PID 1, over its private socket.
//!
//! systemd answers root on `/run/systemd/private` without a message bus. If the bus is down, the agent therefore loses
//! its status API, but can complete the pivot. If the socket is missing, the system bus is used.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::StreamExt;
use zbus::message::Type;
use zbus::{Connection, MessageStream, OwnedObjectPath, OwnedVariant};

use super::policy::KINDS;
use super::{Verb, private};
use support::failpoint::{self, Point};

const PRIVATE_SOCKET: &str = "/run/systemd/private";
const DESTINATION: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
pub(super) const UNIT: &str = "org.freedesktop.systemd1.Unit";
pub(super) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Time limit for a reply of PID 1. A reload on a busy machine takes several seconds.
const REPLY_TIMEOUT: Duration = Duration::from_secs(90);
/// The auxiliary vector of PID 1, which changes with every exec.
const AUXV: &str = "/proc/1/auxv";
/// Time limit for the manager to re-execute itself.
const REEXEC_TIMEOUT: Duration = Duration::from_secs(90);

/// Time limit for one attempt to reach the re-executed manager, including the connection.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the private socket to return if another process re-executes the manager.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(30);
/// Number of attempts to request a job if the connection breaks.
const ATTEMPTS: usize = 5;
/// The directory that exists if systemd is the init system (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// Error for a connection that systemd closed, as it does when it is re-executed.
#[derive(Debug, thiserror::Error)]
#[error("systemd closed the connection")]
struct Lost;

/// A connection to PID 1.
pub struct Manager {
    pub(super) connection: Connection,
    /// `None` on the private socket, where no bus routes messages.
    pub(super) destination: Option<&'static str>,
}

/// A unit as `ListUnits` returns it.
pub struct Unit {
    /// Name of the unit, for example `sshd.service`.
    pub name: String,
    /// Active state: `active`, `inactive`, `failed`, `activating` and so on.
    pub active: String,
    /// D-Bus object path of the unit.
    pub(super) path: OwnedObjectPath,
}

impl Unit {
    /// Returns true if the unit is active and of a type that the plan considers.
    pub fn is_active(&self) -> bool {
        matches!(self.active.as_str(), "active" | "reloading") && KINDS.iter().any(|kind| self.name.ends_with(kind))
    }
}

type UnitRow = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

impl Manager {
    /// Time limit for the job of one unit, after which the caller continues without it. Longer than the 90 s that systemd
    /// waits by default until it kills a unit that does not stop.
    pub const JOB_TIMEOUT: Duration = Duration::from_secs(100);

    /// Connects to PID 1. If another process re-executes systemd, the private socket is briefly closed; this call waits
    /// for it. If the socket does not return, the system bus is used.
    ///
    /// # Errors
    /// Fails if systemd denies access, or if neither the socket nor the bus answers.
    pub async fn connect() -> Result<Self> {
        let deadline = tokio::time::Instant::now() + SOCKET_TIMEOUT;
        loop {
            let error = match Self::private().await {
                Ok(manager) => return Ok(manager),
                Err(error) => error,
            };
            if !is_transient(error.kind()) {
                return Err(error).with_context(|| format!("cannot reach systemd on {PRIVATE_SOCKET}"));
            }
            // Without systemd, the socket will not appear.
            if tokio::time::Instant::now() >= deadline || !Path::new(BOOTED).exists() {
                return Self::system_bus().await.with_context(|| format!("{PRIVATE_SOCKET}: {error}"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn private() -> io::Result<Self> {
        let connection =
            private::connect(Path::new(PRIVATE_SOCKET), |builder| builder.method_timeout(REPLY_TIMEOUT)).await?;
        Ok(Self { connection, destination: None })
    }

    async fn system_bus() -> Result<Self> {
        let build = zbus::connection::Builder::system().method_timeout(REPLY_TIMEOUT).build();
        let connection = tokio::time::timeout(ATTEMPT_TIMEOUT, build)
            .await
            .map_err(|_| {
                anyhow!("cannot reach systemd on the system bus: no answer within {} s", ATTEMPT_TIMEOUT.as_secs())
            })?
            .context("cannot reach systemd on the system bus either")?;
        // A bus delivers only the signals that a client subscribes to. The private socket delivers all of them.
        let ended = format!("type='signal',sender='{DESTINATION}',interface='{MANAGER}',member='JobRemoved'");
        let bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        connection
            .call_method(Some(bus.0), bus.1, Some(bus.0), "AddMatch", &(ended,))
            .await
            .context("cannot subscribe to the end of jobs on the system bus")?;
        Ok(Self { connection, destination: Some(DESTINATION) })
    }

    /// Connects once, without waiting, and checks that systemd answers.
    async fn answering() -> Result<Self> {
        let manager = match Self::private().await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::system_bus().await?,
            other => other?,
        };
        manager.version().await?;
        Ok(manager)
    }

    async fn call<B>(&self, method: &'static str, body: &B) -> Result<zbus::Message>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        self.connection
            .call_method(self.destination, PATH, Some(MANAGER), method, body)
            .await
            .with_context(|| format!("systemd refused {method}"))
    }

    /// Reloads all unit files and runs the generators, as `systemctl daemon-reload` does.
    pub async fn reload(&self) -> Result<()> {
        failpoint::hit(Point::Systemd, "Reload").context("cannot reload systemd")?;
        self.call("Reload", &()).await.map(drop)
    }

    /// Replaces PID 1 by the systemd of the current `/usr`, which keeps its state. Returns a connection to the new
    /// systemd.
    ///
    /// The call has no reply, because the exec closes the connection. The auxiliary vector shows that the exec has
    /// happened: it holds addresses that the kernel randomizes at each exec. systemd's own timestamps survive it.
    ///
    /// # Errors
    /// Fails if systemd refuses the call, or does not answer as a new program within the time limit. PID 1 may then
    /// still be the old program.
    pub async fn reexecute(self) -> Result<Self> {
        let before = std::fs::read(AUXV).with_context(|| format!("cannot read {AUXV}"))?;
        failpoint::hit(Point::Systemd, "Reexecute").context("cannot re-execute systemd")?;
        // Every error except a refusal means that the connection was closed.
        if let Err(error) = self.call("Reexecute", &()).await
            && matches!(error.downcast_ref(), Some(zbus::Error::MethodError(..)))
        {
            return Err(error);
        }
        let deadline = tokio::time::Instant::now() + REEXEC_TIMEOUT;
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let executed = std::fs::read(AUXV).is_ok_and(|now| now != before);
            let answer = tokio::time::timeout(ATTEMPT_TIMEOUT, Self::answering())
                .await
                .unwrap_or_else(|_| bail!("no answer within {} s", ATTEMPT_TIMEOUT.as_secs()));
            match answer {
                Ok(manager) if executed => return Ok(manager),
                _ if tokio::time::Instant::now() < deadline => {}
                Ok(_) => bail!("systemd did not re-execute itself within {} s", REEXEC_TIMEOUT.as_secs()),
                Err(error) => return Err(error.context("systemd does not answer after its re-execution")),
            }
        }
    }

    /// Returns the version that PID 1 reports, such as `252.39-1~deb12u1`.
    pub async fn version(&self) -> Result<String> {
        String::try_from(self.property(PATH, MANAGER, "Version").await?).context("systemd's version is not a string")
    }

    /// Isolates `target`. Returns when the job is queued, without waiting for its end: the job stops and starts units,
    /// which may include the caller.
    async fn isolate(&self, target: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "Isolate").with_context(|| format!("cannot isolate {target}"))?;
        self.call("StartUnit", &(target, "isolate")).await.map(drop)
    }

    /// Restarts `unit` if it is active, and waits at most `limit` for the job to end.
    async fn try_restart(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("TryRestartUnit", unit, limit).await
    }

    /// Starts `unit`, and waits at most `limit` for the job to end.
    pub async fn start(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("StartUnit", unit, limit).await
    }

    /// Stops `unit`, and waits at most `limit` for the job to end. A unit that is not loaded counts as stopped.
    pub async fn stop(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("StopUnit", unit, limit).await.or_else(not_loaded)
    }

    /// Resets the failed state of `unit`. Does nothing if the unit is not loaded.
    pub async fn reset_failed(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "ResetFailed").with_context(|| format!("cannot reset {unit}"))?;
        self.call("ResetFailedUnit", &(unit,)).await.map(drop).or_else(not_loaded)
    }

    async fn job(&self, method: &'static str, unit: &str, limit: Duration) -> Result<()> {
        failpoint::hit(Point::Systemd, method).with_context(|| format!("{method} {unit}"))?;
        // The stream is opened before the job is queued, so that the signal of its end cannot be missed.
        let mut signals = MessageStream::from(&self.connection);
        self.call("Subscribe", &()).await.or_else(already_subscribed)?;
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

    /// Returns true if `unit` is active or has a job. A target that is being reached has a job: its own start.
    pub async fn is_active_or_queued(&self, unit: &str) -> Result<bool> {
        let rows = self.rows().await?;
        Ok(rows.iter().any(|row| row.0 == unit && (row.3 == "active" || row.7 != 0)))
    }

    async fn rows(&self) -> Result<Vec<UnitRow>> {
        let reply = self.call("ListUnits", &()).await?;
        reply.body().deserialize().context("cannot decode the unit list of systemd")
    }

    /// Lists all loaded units.
    pub async fn list(&self) -> Result<Vec<Unit>> {
        let rows = self.rows().await?;
        Ok(rows.into_iter().map(|row| Unit { name: row.0, active: row.3, path: row.6 }).collect())
    }

    pub(super) async fn path_of(&self, unit: &str) -> Result<OwnedObjectPath> {
        let reply = self.call("GetUnit", &(unit,)).await?;
        reply.body().deserialize().with_context(|| format!("cannot decode the path of {unit}"))
    }

    /// Returns the `InvocationID` of the current run of `unit`; empty if it never ran or is not loaded.
    pub async fn invocation(&self, unit: &str) -> Result<Vec<u8>> {
        let path = match self.path_of(unit).await {
            Ok(path) => path,
            Err(error) => return not_loaded(error).map(|()| Vec::new()),
        };
        let value = self.property(path.as_str(), UNIT, "InvocationID").await?;
        Vec::try_from(value).context("InvocationID is not a list of bytes")
    }

    /// Runs one job, and waits at most `limit` for its end. If another process re-executes systemd in the meantime, the job
    /// is requested again, which is safe because these jobs may run twice.
    ///
    /// # Errors
    /// Fails if systemd refuses the job, or if the job fails or exceeds `limit`. In the last case the job continues.
    pub async fn run(&mut self, verb: Verb, unit: &str, limit: Duration) -> Result<()> {
        for _ in 0..ATTEMPTS {
            let done = match verb {
                Verb::Reload => self.job("ReloadUnit", unit, limit).await,
                Verb::TryRestart => self.try_restart(unit, limit).await,
                Verb::Start => self.start(unit, limit).await,
                Verb::Stop => self.stop(unit, limit).await,
            };
            match done {
                Err(error) if Self::is_lost(&error) => *self = Self::connect().await?,
                done => return done,
            }
        }
        bail!("{unit}: systemd closed the connection {ATTEMPTS} times")
    }

    /// Returns true if the error is a broken connection. The result of the request is then unknown.
    pub fn is_lost(error: &anyhow::Error) -> bool {
        let broken = |error: &zbus::Error| match error {
            zbus::Error::InputOutput(error) => error.kind() != io::ErrorKind::TimedOut,
            _ => false,
        };
        error.is::<Lost>() || error.downcast_ref().is_some_and(broken)
    }

    /// Returns those of `units` that have a job, and those that failed.
    pub async fn pending_and_failed(&self, units: &BTreeSet<&str>) -> Result<(Vec<String>, Vec<String>)> {
        let rows: Vec<_> = self.rows().await?.into_iter().filter(|row| units.contains(row.0.as_str())).collect();
        let of =
            |wanted: fn(&UnitRow) -> bool| rows.iter().filter(|row| wanted(row)).map(|row| row.0.clone()).collect();
        Ok((of(|row| row.7 != 0), of(|row| row.3 == "failed")))
    }

    /// Re-executes the user manager `unit`, which keeps the units that it started. Does nothing if it is not loaded.
    pub async fn reexecute_user(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "KillUnit").with_context(|| format!("cannot re-execute {unit}"))?;
        // systemd(1): user managers re-execute themselves on SIGRTMIN+25.
        let signal = nix::libc::SIGRTMIN() + 25;
        self.call("KillUnit", &(unit, "main", signal)).await.map(drop).or_else(not_loaded)
    }

    /// Returns true if the socket starts one service per connection.
    pub(super) async fn accepts(&self, socket: &str) -> Result<bool> {
        let path = self.path_of(socket).await?;
        let value = self.property(path.as_str(), "org.freedesktop.systemd1.Socket", "Accept").await?;
        bool::try_from(value).context("Accept is not a boolean")
    }

    /// Returns the cgroup of a service, relative to the cgroup root; empty if it has none.
    pub(super) async fn control_group(&self, unit: &Unit) -> Result<String> {
        let value = self.property(unit.path.as_str(), "org.freedesktop.systemd1.Service", "ControlGroup").await?;
        String::try_from(value).context("ControlGroup is not a string")
    }

    /// Returns the commands of a service's `ExecStart=`, each with the path of its program as the first argument.
    pub(super) async fn commands(&self, unit: &Unit) -> Result<Vec<Vec<PathBuf>>> {
        let value = self.property(unit.path.as_str(), "org.freedesktop.systemd1.Service", "ExecStart").await?;
        Ok(commands(value)?)
    }

    /// Returns the path of the unit file; empty if the unit has none.
    pub(super) async fn fragment(&self, unit: &Unit) -> Result<PathBuf> {
        let value = self.property(unit.path.as_str(), UNIT, "FragmentPath").await?;
        String::try_from(value).map(PathBuf::from).context("FragmentPath is not a string")
    }

    async fn property(&self, path: &str, interface: &str, name: &str) -> Result<OwnedVariant> {
        let reply = self
            .connection
            .call_method(self.destination, path, Some(PROPERTIES), "Get", &(interface, name))
            .await
            .with_context(|| format!("cannot read {name} of {path}"))?;
        reply.body().deserialize().with_context(|| format!("cannot decode {name} of {path}"))
    }

    /// Isolates `target`. A target without `AllowIsolate=yes` is only started, as systemd itself does at boot. Returns when
    /// the job is queued: true if the target is isolated.
    pub async fn isolate_or_start(&self, target: &str) -> Result<bool> {
        let Err(error) = self.isolate(target).await else { return Ok(true) };
        match error.downcast_ref::<zbus::Error>() {
            Some(zbus::Error::MethodError(name, ..)) if name.ends_with(".NoIsolation") => {}
            _ => return Err(error),
        }
        self.call("StartUnit", &(target, "replace")).await.map(|_| false)
    }
}

/// A command of a service: path, arguments, ignored failure, and six values about its last run.
type CommandRow = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

fn commands(value: OwnedVariant) -> zbus::Result<Vec<Vec<PathBuf>>> {
    let rows = Vec::<CommandRow>::try_from(value)?;
    // With `ExecStart=@`, the first argument may be any name.
    let words = |row: CommandRow| [row.0].into_iter().chain(row.1.into_iter().skip(1)).map(PathBuf::from).collect();
    Ok(rows.into_iter().map(words).collect())
}

/// Returns true if a failure to connect can be caused by a PID 1 that is re-executing itself.
fn is_transient(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, UnexpectedEof};
    matches!(kind, NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof | TimedOut)
}

fn not_loaded(error: anyhow::Error) -> Result<()> {
    match error.downcast_ref::<zbus::Error>() {
        Some(zbus::Error::MethodError(name, ..)) if name.ends_with(".NoSuchUnit") => Ok(()),
        _ => Err(error),
    }
}

/// Accepts the error that a second `Subscribe` on the private socket returns.
fn already_subscribed(error: anyhow::Error) -> Result<zbus::Message> {
    match error.downcast_ref::<zbus::Error>() {
        Some(zbus::Error::MethodError(name, _, reply)) if name.contains("AlreadySubscribed") => Ok(reply.clone()),
        _ => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_as_active() {
        for (name, active, expected) in [
            ("a.service", "active", true),
            ("a.mount", "reloading", true),
            ("a.service", "activating", false),
            ("a.service", "failed", false),
            ("a.target", "active", false),
        ] {
            let unit = Unit { name: name.into(), active: active.into(), path: OwnedObjectPath::default() };
            assert_eq!(unit.is_active(), expected, "{name} {active}");
        }
    }

    #[test]
    fn commands_begin_with_their_program() {
        let argv = ["name", "-x", "/usr/x"].map(str::to_owned).to_vec();
        let row: CommandRow = ("/usr/bin/a".into(), argv, false, 0, 0, 0, 0, 7, 0, 0);
        let value = OwnedVariant::try_from(zbus::Variant::from(vec![row])).unwrap();
        assert_eq!(commands(value).unwrap(), [["/usr/bin/a", "-x", "/usr/x"].map(PathBuf::from)]);
    }

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

    #[test]
    fn only_transient_failures_are_retried() {
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused, io::ErrorKind::UnexpectedEof] {
            assert!(is_transient(kind), "{kind}");
        }
        assert!(!is_transient(io::ErrorKind::PermissionDenied));
        assert!(!is_transient(io::ErrorKind::InvalidData));
    }
}
