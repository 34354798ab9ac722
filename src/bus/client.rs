//! Talking to the daemon: over its private socket as root, over the system bus otherwise.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UnixStream;
use zbus::connection::Builder;
use zbus::{Connection, OwnedVariant};

use super::{INTERFACE, NAME, PATH, build, within};
use crate::report::{Outcome, Status};
use unit_refresh::Manager;

const DAEMON_UNIT: &str = "node-image-pivotd.service";

/// A connection to the daemon.
#[derive(Clone)]
pub struct Client {
    connection: Connection,
    destination: Option<&'static str>,
}

/// The error of a call to the daemon.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The call ended, with this outcome and message.
    #[error("{1}")]
    Ended(Outcome, String),
    /// The daemon went away in the middle; it goes on where it was when it is started again.
    #[error("the connection to the daemon broke: {0}")]
    Disconnected(String),
}

impl CallError {
    /// Returns how the call ended.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Ended(outcome, _) => *outcome,
            Self::Disconnected(_) => Outcome::Internal,
        }
    }

    /// Returns the error of a call that could not be made.
    fn failed(message: String) -> Self {
        Self::Ended(Outcome::Internal, message)
    }
}

impl Client {
    /// Connects to read the status: to `socket` when it may be opened, else over the system bus.
    pub async fn connect(socket: &Path) -> Result<Self> {
        match UnixStream::connect(socket).await {
            Ok(stream) => Self::private(stream).await.with_context(|| format!("no answer on {}", socket.display())),
            Err(refused) => {
                let connection = build(Builder::system())
                    .await
                    .with_context(|| format!("{}: {refused}; and no system bus", socket.display()))?;
                Ok(Self { connection, destination: Some(NAME) })
            }
        }
    }

    async fn private(stream: UnixStream) -> Result<Self> {
        let connection = build(Builder::unix_stream(stream.into_std()?).p2p()).await?;
        Ok(Self { connection, destination: None })
    }

    /// Connects to call a method, which only root may; `None` when no daemon runs.
    ///
    /// # Errors
    /// [`CallError::Ended`] for others than root, [`CallError::Disconnected`] when the daemon went
    /// away before it answered.
    pub async fn running(socket: &Path) -> Result<Option<Self>, CallError> {
        match UnixStream::connect(socket).await {
            Ok(stream) => {
                Self::private(stream).await.map(Some).map_err(|error| CallError::Disconnected(format!("{error:#}")))
            }
            Err(error) => absent(socket, &error).map(|()| None),
        }
    }

    /// Connects to call a method; starts the daemon's unit first, once, when it does not run.
    ///
    /// # Errors
    /// As [`Client::running`]; [`CallError::Ended`] when the unit cannot be started.
    pub async fn connect_or_start(socket: &Path) -> Result<Self, CallError> {
        if let Some(client) = Self::running(socket).await? {
            return Ok(client);
        }
        // systemd would say so, in words that do not tell what to do.
        if !rustix::process::geteuid().is_root() {
            return Err(CallError::failed(format!("must be root to start {DAEMON_UNIT}")));
        }
        start().await.map_err(|error| {
            CallError::failed(format!("the daemon cannot be started: {error:#}; see systemctl status {DAEMON_UNIT}"))
        })?;
        Self::running(socket).await?.ok_or_else(|| {
            CallError::failed(format!(
                "{DAEMON_UNIT} was started and nothing listens on {}; see systemctl status {DAEMON_UNIT}",
                socket.display()
            ))
        })
    }

    /// Waits at most `limit` for a daemon that went away. Its unit has `Restart=`, so starting it again
    /// is not ours, and would use up its start limit; only in the end is that tried, once.
    ///
    /// # Errors
    /// As [`Client::connect_or_start`].
    pub async fn reconnect(socket: &Path, limit: Duration) -> Result<Self, CallError> {
        let deadline = tokio::time::Instant::now() + limit;
        while tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match Self::running(socket).await {
                Ok(Some(client)) => return Ok(client),
                Ok(None) | Err(CallError::Disconnected(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Self::connect_or_start(socket).await
    }

    /// Calls a method and waits for its end, however long it takes; returns the lines it answers.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, method: &str) -> Result<Vec<String>, CallError> {
        self.call_with(method, &()).await
    }

    /// The same with arguments.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call_with<B>(&self, method: &str, body: &B) -> Result<Vec<String>, CallError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        // Methods answer with lines or with nothing.
        Ok(self.reply(method, body).await?.body().deserialize().unwrap_or_default())
    }

    /// The plan as a JSON document. See [`Client::call`].
    pub async fn plan_document(&self) -> Result<String, CallError> {
        let reply = self.reply("PlanDocument", &()).await?;
        reply.body().deserialize().map_err(|error| CallError::failed(format!("the daemon's answer: {error}")))
    }

    /// The plan for `/etc` as a unified diff. See [`Client::call`].
    pub async fn diff_etc(&self, secrets: bool) -> Result<Vec<u8>, CallError> {
        let reply = self.reply("DiffEtc", &secrets).await?;
        reply.body().deserialize().map_err(|error| CallError::failed(format!("the daemon's answer: {error}")))
    }

    async fn reply<B>(&self, method: &str, body: &B) -> Result<zbus::Message, CallError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        let call = self.connection.call_method(self.destination, PATH, Some(INTERFACE), method, body);
        call.await.map_err(classify)
    }

    /// The status document. The daemon has it at hand, so one that does not answer hangs, and is not waited for.
    pub async fn status(&self) -> Result<Status> {
        let (properties, wanted) = (Some("org.freedesktop.DBus.Properties"), (INTERFACE, "Status"));
        let reply = within(self.connection.call_method(self.destination, PATH, properties, "Get", &wanted))
            .await
            .context("the daemon does not answer; see systemctl status node-image-pivotd.service")?;
        let value: OwnedVariant = reply.body().deserialize().context("the daemon's status")?;
        let text = String::try_from(value).context("the daemon's status is not a string")?;
        serde_json::from_str(&text).context("the daemon's status is of another version")
    }
}

async fn start() -> Result<()> {
    let limit = Duration::from_secs(60);
    let manager = Manager::connect().await?;
    match manager.start(DAEMON_UNIT, limit).await {
        Ok(()) => Ok(()),
        // A PID 1 of another /usr than the one in place may be unable to start anything: what was left
        // by a daemon that was killed in the middle of a switch or an undo.
        Err(_) if !unit_refresh::mapped_files(1).is_empty() => {
            let manager = manager.reexecute().await?;
            // From 254 on systemd remembers how often a unit was started: a daemon that was refused for that is
            // refused by the new one, too.
            manager.reset_failed(DAEMON_UNIT).await?;
            manager.start(DAEMON_UNIT, limit).await
        }
        Err(error) => Err(error),
    }
}

/// Whether the socket that could not be connected to means that no daemon runs.
fn absent(socket: &Path, error: &io::Error) -> Result<(), CallError> {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(()),
        io::ErrorKind::PermissionDenied => {
            Err(CallError::failed(format!("must be root: {} may not be opened", socket.display())))
        }
        _ => Err(CallError::failed(format!("cannot connect to {}: {error}", socket.display()))),
    }
}

fn classify(error: zbus::Error) -> CallError {
    let zbus::Error::MethodError(name, message, _) = &error else {
        return match error {
            zbus::Error::FDO(inner) => CallError::failed(inner.to_string()),
            other => CallError::Disconnected(other.to_string()),
        };
    };
    let message = message.clone().unwrap_or_else(|| name.to_string());
    CallError::Ended(Outcome::of_error(name.as_str()), message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_without_a_listener_means_that_no_daemon_runs() {
        let of = |kind: io::ErrorKind| absent(Path::new("/run/x"), &kind.into());
        assert!(of(io::ErrorKind::NotFound).is_ok());
        assert!(of(io::ErrorKind::ConnectionRefused).is_ok());
        let error = of(io::ErrorKind::PermissionDenied).unwrap_err();
        assert!(matches!(&error, CallError::Ended(_, message) if message.starts_with("must be root")), "{error}");
        assert!(matches!(of(io::ErrorKind::NotConnected).unwrap_err(), CallError::Ended(Outcome::Internal, _)));
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        assert!(Client::running(&socket).await.unwrap().is_none());
        drop(tokio::net::UnixListener::bind(&socket).unwrap());
        assert!(Client::running(&socket).await.unwrap().is_none());
    }

    /// As a daemon, or whoever holds its socket, that hangs.
    #[tokio::test]
    async fn a_daemon_that_never_answers_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _hangs = tokio::net::UnixListener::bind(&socket).unwrap();
        let long = Duration::from_secs(60);
        let running = tokio::time::timeout(long, Client::running(&socket)).await.unwrap();
        assert!(matches!(running, Err(CallError::Disconnected(text)) if text.contains("no answer within")));
        let connected = tokio::time::timeout(long, Client::connect(&socket)).await.unwrap();
        let text = format!("{:#}", connected.err().unwrap());
        assert!(text.contains("no answer within") && text.contains(&*socket.to_string_lossy()), "{text}");
    }

    /// As a daemon that is stopped, or stuck, after it took the connection.
    #[tokio::test]
    async fn a_status_that_never_comes_is_not_waited_for() {
        let (ours, its) = UnixStream::pair().unwrap();
        let its = Builder::unix_stream(its.into_std().unwrap()).server(zbus::Guid::generate()).p2p();
        let (client, silent) = tokio::join!(Client::private(ours), its.build());
        let (client, _silent) = (client.unwrap(), silent.unwrap());
        let status = tokio::time::timeout(Duration::from_secs(60), client.status()).await.unwrap();
        let text = format!("{:#}", status.unwrap_err());
        assert!(text.contains("does not answer") && text.contains("no answer within"), "{text}");
    }

    #[tokio::test]
    async fn a_bus_that_never_answers_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("bus");
        let _hangs = tokio::net::UnixListener::bind(&socket).unwrap();
        let bus = Builder::address(format!("unix:path={}", socket.display()).as_str());
        let built = tokio::time::timeout(Duration::from_secs(60), build(bus)).await.unwrap();
        assert!(built.unwrap_err().to_string().contains("no answer within"));
    }
}
