//! The D-Bus interface of PID 1, over its private socket.
//!
//! systemd answers root on `/run/systemd/private` without a message bus. If the bus is down, the agent therefore loses
//! its status API, but can complete the pivot. If the socket is missing, the system bus is used.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use zbus::{Connection, OwnedVariant};

use super::private;
use support::failpoint::{self, Point};

const PRIVATE_SOCKET: &str = "/run/systemd/private";
const DESTINATION: &str = "org.freedesktop.systemd1";
pub(super) const PATH: &str = "/org/freedesktop/systemd1";
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
/// The directory that exists if systemd is the init system (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// Error for a connection that systemd closed, as it does when it is re-executed.
#[derive(Debug, thiserror::Error)]
#[error("systemd closed the connection")]
pub(super) struct Lost;

/// A connection to PID 1.
pub struct Manager {
    pub(super) connection: Connection,
    /// `None` on the private socket, where no bus routes messages.
    pub(super) destination: Option<&'static str>,
}

impl Manager {
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
                return Self::system_bus().await.map_err(|bus| unreachable(&error, &bus));
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
            .context("cannot reach systemd on the system bus")?;
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

    pub(super) async fn call<B>(&self, method: &'static str, body: &B) -> Result<zbus::Message>
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
        self.property(PATH, MANAGER, "Version").await
    }

    /// Returns true if the error is a broken connection. The result of the request is then unknown.
    pub fn is_lost(error: &anyhow::Error) -> bool {
        let broken = |error: &zbus::Error| match error {
            zbus::Error::InputOutput(error) => error.kind() != io::ErrorKind::TimedOut,
            _ => false,
        };
        error.is::<Lost>() || error.downcast_ref().is_some_and(broken)
    }

    pub(super) async fn property<T>(&self, path: &str, interface: &str, name: &str) -> Result<T>
    where
        T: TryFrom<OwnedVariant, Error: std::error::Error + Send + Sync + 'static>,
    {
        let reply = self
            .connection
            .call_method(self.destination, path, Some(PROPERTIES), "Get", &(interface, name))
            .await
            .with_context(|| format!("cannot read {name} of {path}"))?;
        let unexpected = || format!("cannot decode {name} of {path}");
        let value: OwnedVariant = reply.body().deserialize().with_context(unexpected)?;
        T::try_from(value).with_context(unexpected)
    }
}

/// Returns the error of both ways to systemd. A cause that they share is in it once.
fn unreachable(private: &io::Error, bus: &anyhow::Error) -> anyhow::Error {
    let cause = bus.root_cause().to_string();
    if cause == private.to_string() {
        return anyhow!("cannot reach systemd, neither on {PRIVATE_SOCKET} nor on the system bus: {cause}");
    }
    anyhow!("cannot reach systemd on {PRIVATE_SOCKET}: {private}; {}: {cause}", bus)
}

/// Returns true if a failure to connect can be caused by a PID 1 that is re-executing itself.
fn is_transient(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, UnexpectedEof};
    matches!(kind, NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof | TimedOut)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_of_both_ways_to_systemd_is_named_once() {
        let missing = || io::Error::from_raw_os_error(rustix::io::Errno::NOENT.raw_os_error());
        let bus = |error: io::Error| anyhow::Error::from(zbus::Error::from(error)).context("cannot reach the bus");
        let text = unreachable(&missing(), &bus(missing())).to_string();
        assert_eq!(text.matches("No such file").count(), 1, "{text}");
        let text = unreachable(&missing(), &bus(io::Error::other("refused"))).to_string();
        assert!(text.contains("No such file") && text.ends_with("cannot reach the bus: refused"), "{text}");
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
