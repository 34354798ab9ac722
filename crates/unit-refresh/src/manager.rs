//! PID 1, over its private socket.
//!
//! As root, systemd answers on `/run/systemd/private` without any message bus. A dead or
//! restarting bus then costs us the status API, not the pivot. Where the socket is missing, the
//! system bus is used.

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

/// How long a reply of PID 1 may take. A reload on a loaded machine takes seconds.
const REPLY: Duration = Duration::from_secs(90);
/// Changes with every exec of PID 1.
const AUXV: &str = "/proc/1/auxv";
/// How long the manager may be silent while it re-executes itself.
const REEXEC: Duration = Duration::from_secs(90);

/// How long one attempt to reach the re-executed manager may take, connecting included.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the private socket may be away because somebody else re-executes the manager.
const COMEBACK: Duration = Duration::from_secs(30);
/// How often a job is asked for again when the connection breaks.
const RECONNECTS: usize = 5;
/// Exists where systemd runs: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";

/// systemd closed the connection, as it does when it is re-executed.
#[derive(Debug, thiserror::Error)]
#[error("systemd closed the connection")]
struct Lost;

/// A connection to PID 1.
pub struct Manager {
    pub(super) connection: Connection,
    /// Absent on the private socket: there is no bus that could route.
    pub(super) destination: Option<&'static str>,
}

/// One row of `ListUnits`.
pub struct Unit {
    /// `sshd.service`.
    pub name: String,
    /// `active`, `inactive`, `failed`, `activating`…
    pub active: String,
    /// Where its properties are.
    pub(super) path: OwnedObjectPath,
}

impl Unit {
    /// Whether it runs or waits for something, and the plan looks at its kind.
    pub fn is_active(&self) -> bool {
        matches!(self.active.as_str(), "active" | "reloading") && KINDS.iter().any(|kind| self.name.ends_with(kind))
    }
}

type UnitRow = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

impl Manager {
    /// Connects to PID 1. Somebody else's `daemon-reexec` closes the private socket for a moment: that
    /// is waited for. A socket that stays away leaves the system bus.
    pub async fn connect() -> Result<Self> {
        let deadline = tokio::time::Instant::now() + COMEBACK;
        loop {
            let error = match Self::private().await {
                Ok(manager) => return Ok(manager),
                Err(error) => error,
            };
            if !may_come_back(error.kind()) {
                return Err(error).with_context(|| format!("cannot reach systemd on {PRIVATE_SOCKET}"));
            }
            // Where systemd does not run, there is nothing to wait for.
            if tokio::time::Instant::now() >= deadline || !Path::new(BOOTED).exists() {
                return Self::system_bus().await.with_context(|| format!("{PRIVATE_SOCKET}: {error}"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn private() -> io::Result<Self> {
        let connection = private::connect(Path::new(PRIVATE_SOCKET), |builder| builder.method_timeout(REPLY)).await?;
        Ok(Self { connection, destination: None })
    }

    async fn system_bus() -> Result<Self> {
        let build = zbus::connection::Builder::system().method_timeout(REPLY).build();
        let connection = tokio::time::timeout(ANSWER, build)
            .await
            .map_err(|_| anyhow!("the system bus does not answer within {} s", ANSWER.as_secs()))?
            .context("the system bus does not answer either")?;
        // A bus delivers signals to those who ask for them; the private socket does it for all.
        let ended = format!("type='signal',sender='{DESTINATION}',interface='{MANAGER}',member='JobRemoved'");
        let bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        connection
            .call_method(Some(bus.0), bus.1, Some(bus.0), "AddMatch", &(ended,))
            .await
            .context("the system bus does not tell when jobs end")?;
        Ok(Self { connection, destination: Some(DESTINATION) })
    }

    /// One attempt, proven by an answer.
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

    /// Reads the unit files anew and runs the generators.
    pub async fn reload(&self) -> Result<()> {
        failpoint::hit(Point::Systemd, "Reload").context("asking systemd to reload")?;
        self.call("Reload", &()).await.map(drop)
    }

    /// Replaces PID 1 by the systemd that `/usr` now holds, with its state kept; returns connected
    /// to the new one.
    ///
    /// The call has no reply (the connection is closed by the exec). That PID 1 is another program
    /// than before is told by the kernel: the auxiliary vector holds addresses that every exec
    /// draws anew. systemd's own timestamps do not tell, they are carried over.
    pub async fn reexecute(self) -> Result<Self> {
        let before = std::fs::read(AUXV).with_context(|| format!("cannot read {AUXV}"))?;
        failpoint::hit(Point::Systemd, "Reexecute").context("asking systemd to re-execute itself")?;
        // Any other error than a refusal is the closed connection.
        if let Err(error) = self.call("Reexecute", &()).await
            && matches!(error.downcast_ref(), Some(zbus::Error::MethodError(..)))
        {
            return Err(error);
        }
        let deadline = tokio::time::Instant::now() + REEXEC;
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let executed = std::fs::read(AUXV).is_ok_and(|now| now != before);
            let answer = tokio::time::timeout(ANSWER, Self::answering())
                .await
                .unwrap_or_else(|_| bail!("no answer within {} s", ANSWER.as_secs()));
            match answer {
                Ok(manager) if executed => return Ok(manager),
                _ if tokio::time::Instant::now() < deadline => {}
                Ok(_) => bail!("systemd has not re-executed itself within {} s", REEXEC.as_secs()),
                Err(error) => return Err(error.context("systemd did not come back after its re-exec")),
            }
        }
    }

    /// The version that PID 1 reports, such as `252.39-1~deb12u1`.
    pub async fn version(&self) -> Result<String> {
        String::try_from(self.property(PATH, MANAGER, "Version").await?).context("systemd's version is not a string")
    }

    /// Starts the isolation of `target` and returns when the job is queued; it is not waited for,
    /// because whoever asked is part of what it rearranges.
    async fn isolate(&self, target: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "Isolate").with_context(|| format!("isolating {target}"))?;
        self.call("StartUnit", &(target, "isolate")).await.map(drop)
    }

    /// Restarts `unit` if it is running and waits for the job to end, at most `limit`.
    async fn try_restart(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("TryRestartUnit", unit, limit).await
    }

    /// Starts `unit` and waits for the job.
    pub async fn start(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("StartUnit", unit, limit).await
    }

    /// Stops `unit` and waits for the job, at most `limit`. One that is not loaded has been stopped.
    pub async fn stop(&self, unit: &str, limit: Duration) -> Result<()> {
        self.job("StopUnit", unit, limit).await.or_else(not_loaded)
    }

    /// Forgets that `unit` failed. One that is not loaded is forgotten.
    pub async fn reset_failed(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "ResetFailed").with_context(|| format!("resetting {unit}"))?;
        self.call("ResetFailedUnit", &(unit,)).await.map(drop).or_else(not_loaded)
    }

    async fn job(&self, method: &'static str, unit: &str, limit: Duration) -> Result<()> {
        failpoint::hit(Point::Systemd, method).with_context(|| format!("{method} {unit}"))?;
        // The stream is opened before the job is queued: its end cannot be missed.
        let mut signals = MessageStream::from(&self.connection);
        self.call("Subscribe", &()).await.or_else(already_subscribed)?;
        let reply = self.call(method, &(unit, "replace")).await.with_context(|| format!("{method} {unit}"))?;
        let job: OwnedObjectPath = reply.body().deserialize().context("the job path of systemd")?;
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
                "{unit}: its job has not ended within {} s; it goes on, we do not wait: see systemctl list-jobs and \
                 systemctl status {unit}",
                limit.as_secs()
            ),
            Ok(Err(error)) => Err(error),
            Ok(Ok(result)) if matches!(result.as_str(), "done" | "skipped") => Ok(()),
            Ok(Ok(result)) => bail!("{unit}: the job ended as {result}; see systemctl status {unit}"),
        }
    }

    /// Whether `unit` is active, or has a job (the only one that a target gets while what it wants starts is its own
    /// start).
    pub async fn is_up_or_coming(&self, unit: &str) -> Result<bool> {
        let rows = self.rows().await?;
        Ok(rows.iter().any(|row| row.0 == unit && (row.3 == "active" || row.7 != 0)))
    }

    async fn rows(&self) -> Result<Vec<UnitRow>> {
        let reply = self.call("ListUnits", &()).await?;
        reply.body().deserialize().context("the unit list of systemd")
    }

    /// All loaded units.
    pub async fn list(&self) -> Result<Vec<Unit>> {
        let rows = self.rows().await?;
        Ok(rows.into_iter().map(|row| Unit { name: row.0, active: row.3, path: row.6 }).collect())
    }

    pub(super) async fn path_of(&self, unit: &str) -> Result<OwnedObjectPath> {
        let reply = self.call("GetUnit", &(unit,)).await?;
        reply.body().deserialize().with_context(|| format!("the path of {unit}"))
    }

    /// What tells one run of a unit from the next; empty where it never ran or is not loaded.
    pub async fn invocation(&self, unit: &str) -> Result<Vec<u8>> {
        let path = match self.path_of(unit).await {
            Ok(path) => path,
            Err(error) => return not_loaded(error).map(|()| Vec::new()),
        };
        let value = self.property(path.as_str(), UNIT, "InvocationID").await?;
        Vec::try_from(value).context("InvocationID is no list of bytes")
    }

    /// Carries out one job and waits for its end, at most `limit`. When somebody re-executes systemd in between, the
    /// job is asked for again, of the new one: they are of a kind that may be done twice.
    pub async fn run(&mut self, verb: Verb, unit: &str, limit: Duration) -> Result<()> {
        for _ in 0..RECONNECTS {
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
        bail!("{unit}: systemd closed the connection {RECONNECTS} times")
    }

    /// Whether an error means that the connection is gone, and says nothing about what was asked.
    pub fn is_lost(error: &anyhow::Error) -> bool {
        let broken = |error: &zbus::Error| match error {
            zbus::Error::InputOutput(error) => error.kind() != io::ErrorKind::TimedOut,
            _ => false,
        };
        error.is::<Lost>() || error.downcast_ref().is_some_and(broken)
    }

    /// Which of `units` have a job, and which have failed.
    pub async fn pending_and_failed(&self, units: &BTreeSet<&str>) -> Result<(Vec<String>, Vec<String>)> {
        let rows: Vec<_> = self.rows().await?.into_iter().filter(|row| units.contains(row.0.as_str())).collect();
        let of =
            |wanted: fn(&UnitRow) -> bool| rows.iter().filter(|row| wanted(row)).map(|row| row.0.clone()).collect();
        Ok((of(|row| row.7 != 0), of(|row| row.3 == "failed")))
    }

    /// Tells the user manager that `unit` is to re-execute itself. It keeps all that it has started.
    pub async fn reexecute_user(&self, unit: &str) -> Result<()> {
        failpoint::hit(Point::Systemd, "KillUnit").with_context(|| format!("re-executing {unit}"))?;
        // systemd(1): SIGRTMIN+25, of user managers alone.
        let signal = nix::libc::SIGRTMIN() + 25;
        self.call("KillUnit", &(unit, "main", signal)).await.map(drop).or_else(not_loaded)
    }

    /// Whether each connection of a socket has a service of its own.
    pub async fn accepts(&self, socket: &str) -> Result<bool> {
        let path = self.path_of(socket).await?;
        let value = self.property(path.as_str(), "org.freedesktop.systemd1.Socket", "Accept").await?;
        bool::try_from(value).context("Accept is not a boolean")
    }

    /// The cgroup of a service, relative to the cgroup root; empty when it has none.
    pub async fn control_group(&self, unit: &Unit) -> Result<String> {
        let value = self.property(unit.path.as_str(), "org.freedesktop.systemd1.Service", "ControlGroup").await?;
        String::try_from(value).context("ControlGroup is not a string")
    }

    /// Returns the commands of a service's `ExecStart=`, each with the path of its program as the first argument.
    pub async fn commands(&self, unit: &Unit) -> Result<Vec<Vec<PathBuf>>> {
        let value = self.property(unit.path.as_str(), "org.freedesktop.systemd1.Service", "ExecStart").await?;
        Ok(commands(value)?)
    }

    /// The unit's file; empty when it has none.
    pub async fn fragment(&self, unit: &Unit) -> Result<PathBuf> {
        let value = self.property(unit.path.as_str(), UNIT, "FragmentPath").await?;
        String::try_from(value).map(PathBuf::from).context("FragmentPath is not a string")
    }

    async fn property(&self, path: &str, interface: &str, name: &str) -> Result<OwnedVariant> {
        let reply = self
            .connection
            .call_method(self.destination, path, Some(PROPERTIES), "Get", &(interface, name))
            .await
            .with_context(|| format!("cannot read {name} of {path}"))?;
        reply.body().deserialize().with_context(|| format!("{name} of {path}"))
    }

    /// Starts the isolation of `target`, or only starts one that may not be isolated (no `AllowIsolate=yes`), as systemd
    /// itself does at boot; the job is not waited for. Whether it is isolated.
    pub async fn isolate_or_start(&self, target: &str) -> Result<bool> {
        let Err(error) = self.isolate(target).await else { return Ok(true) };
        match error.downcast_ref::<zbus::Error>() {
            Some(zbus::Error::MethodError(name, ..)) if name.ends_with(".NoIsolation") => {}
            _ => return Err(error),
        }
        self.call("StartUnit", &(target, "replace")).await.map(|_| false)
    }
}

/// One command of a service: path, arguments, whether a failure is ignored, and how it ran last.
type CommandRow = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

fn commands(value: OwnedVariant) -> zbus::Result<Vec<Vec<PathBuf>>> {
    let rows = Vec::<CommandRow>::try_from(value)?;
    // The first argument may be any name (`ExecStart=@`).
    let words = |row: CommandRow| [row.0].into_iter().chain(row.1.into_iter().skip(1)).map(PathBuf::from).collect();
    Ok(rows.into_iter().map(words).collect())
}

/// Whether a failure to connect is what a PID 1 that re-executes itself looks like.
fn may_come_back(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, UnexpectedEof};
    matches!(kind, NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof | TimedOut)
}

fn not_loaded(error: anyhow::Error) -> Result<()> {
    match error.downcast_ref::<zbus::Error>() {
        Some(zbus::Error::MethodError(name, ..)) if name.ends_with(".NoSuchUnit") => Ok(()),
        _ => Err(error),
    }
}

/// On the private socket a second Subscribe is an error that changes nothing.
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
    fn answers_of_systemd_that_are_no_failures() {
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
    fn a_refusal_is_final_and_a_restart_is_not() {
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused, io::ErrorKind::UnexpectedEof] {
            assert!(may_come_back(kind), "{kind}");
        }
        assert!(!may_come_back(io::ErrorKind::PermissionDenied));
        assert!(!may_come_back(io::ErrorKind::InvalidData));
    }
}
