//! The client of the daemon: over its private socket as root, over the system bus otherwise.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UnixStream;
use zbus::connection::Builder;
use zbus::{Connection, OwnedVariant};

use super::{INTERFACE, NAME, PATH, build, within};
use crate::report::{Outcome, Status};
use unit_refresh::{Manager, Verb};

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
    /// The daemon ended during the call. It continues from its record when it is started again.
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

    /// Returns the error of a call that the daemon did not answer with a D-Bus error.
    fn failed(message: String) -> Self {
        Self::Ended(Outcome::Internal, message)
    }
}

impl Client {
    /// Connects to read the status: to `socket` if the caller may open it, else over the system bus.
    ///
    /// # Errors
    /// Neither answers.
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

    /// Connects as root to call a method. Returns `None` if no daemon runs.
    ///
    /// # Errors
    /// [`CallError::Ended`] for other users than root, [`CallError::Disconnected`] if the daemon ended before it answered.
    pub async fn running(socket: &Path) -> Result<Option<Self>, CallError> {
        match UnixStream::connect(socket).await {
            Ok(stream) => {
                Self::private(stream).await.map(Some).map_err(|error| CallError::Disconnected(format!("{error:#}")))
            }
            Err(error) => absent(socket, &error).map(|()| None),
        }
    }

    /// Connects to call a method. If no daemon runs, starts its unit once.
    ///
    /// # Errors
    /// As [`Client::running`]; [`CallError::Ended`] if the unit cannot be started.
    pub async fn connect_or_start(socket: &Path) -> Result<Self, CallError> {
        if let Some(client) = Self::running(socket).await? {
            return Ok(client);
        }
        // systemd's own error does not name the remedy.
        if !rustix::process::geteuid().is_root() {
            return Err(CallError::failed(format!("must be root to start {DAEMON_UNIT}")));
        }
        start().await.map_err(|error| {
            CallError::failed(format!(
                "cannot start the daemon: {error:#}; nothing was changed; see systemctl status {DAEMON_UNIT}"
            ))
        })?;
        Self::running(socket).await?.ok_or_else(|| {
            CallError::failed(format!(
                "{DAEMON_UNIT} was started and nothing listens on {}; see systemctl status {DAEMON_UNIT}",
                socket.display()
            ))
        })
    }

    /// Waits at most `limit` for a daemon that ended. systemd restarts it (`Restart=`), and another start would count
    /// against its start limit, so the client starts the unit only after `limit`, once.
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

    /// Calls a method and waits for its end without a time limit. Returns the lines of the answer.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, method: &str) -> Result<Vec<String>, CallError> {
        self.call_with(method, &()).await
    }

    /// Calls a method with arguments. See [`Client::call`].
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

    /// Returns the plan as a JSON document. See [`Client::call`].
    pub async fn plan_document(&self) -> Result<String, CallError> {
        let reply = self.reply("PlanDocument", &()).await?;
        reply.body().deserialize().map_err(|error| CallError::failed(format!("the daemon's answer: {error}")))
    }

    /// Returns the plan for `/etc` as a unified diff, of unreadable files too if `secrets`. See [`Client::call`].
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

    /// Returns the report as a JSON document.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub async fn report(&self) -> Result<String> {
        let reply = within(self.connection.call_method(self.destination, PATH, Some(INTERFACE), "Report", &())).await;
        let reply = reply.context("the daemon does not answer; see systemctl status node-image-pivotd.service")?;
        reply.body().deserialize().context("cannot read the daemon's answer")
    }

    /// Returns the status document.
    ///
    /// # Errors
    /// The daemon does not answer within [`ANSWER`]: it needs no time for the document, so it hangs. Also fails if the
    /// daemon is of another version.
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
    let mut manager = Manager::connect().await?;
    match manager.run(Verb::Start, DAEMON_UNIT, limit).await {
        Ok(()) => Ok(()),
        // A daemon that was killed during a switch or an undo may leave PID 1 with the files of another /usr, from
        // which it cannot start services.
        Err(_) if !unit_refresh::mapped_files(1).is_empty() => {
            let mut manager = manager.reexecute().await?;
            // Since version 254 systemd keeps the start counters over its re-execution, so the limit still applies.
            manager.reset_failed(DAEMON_UNIT).await?;
            manager.run(Verb::Start, DAEMON_UNIT, limit).await
        }
        Err(error) => Err(error),
    }
}

/// Returns `Ok` if `error`, from connecting to the socket, means that no daemon runs.
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
    async fn a_socket_left_by_a_dead_daemon_counts_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        assert!(Client::running(&socket).await.unwrap().is_none());
        drop(tokio::net::UnixListener::bind(&socket).unwrap());
        assert!(Client::running(&socket).await.unwrap().is_none());
    }

    /// The socket is held by a daemon, or by systemd for it, that hangs.
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

    /// The daemon is stopped or hangs after it has accepted the connection.
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
