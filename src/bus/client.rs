//! Talking to the daemon: over its private socket as root, over the system bus otherwise.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use zbus::{Connection, OwnedVariant};

use super::{INTERFACE, NAME, PATH};
use crate::report::Status;
use crate::units::Manager;

const DAEMON_UNIT: &str = "node-image-pivotd.service";

/// A connection to the daemon.
#[derive(Clone)]
pub struct Client {
    connection: Connection,
    destination: Option<&'static str>,
}

/// How a call to the daemon ends badly.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Preflight refused before anything changed.
    #[error("{0}")]
    Refused(String),
    /// Another attempt gives the same result.
    #[error("{0}")]
    Permanent(String),
    /// Somebody called cancel.
    #[error("{0}")]
    Cancelled(String),
    /// The daemon said why.
    #[error("{0}")]
    Failed(String),
    /// The daemon went away in the middle; it goes on where it was when it is started again.
    #[error("the connection to the daemon broke: {0}")]
    Disconnected(String),
}

impl Client {
    /// Connects to a daemon that runs: to `socket` when it may be opened, else over the system bus.
    pub async fn connect(socket: &Path) -> Result<Self> {
        match tokio::net::UnixStream::connect(socket).await {
            Ok(stream) => {
                let connection = zbus::connection::Builder::unix_stream(stream.into_std()?)
                    .p2p()
                    .build()
                    .await
                    .with_context(|| format!("no answer on {}", socket.display()))?;
                Ok(Self { connection, destination: None })
            }
            Err(refused) => {
                let connection = zbus::connection::Builder::system()
                    .build()
                    .await
                    .with_context(|| format!("{}: {refused}; and no system bus", socket.display()))?;
                Ok(Self { connection, destination: Some(NAME) })
            }
        }
    }

    /// Connects; starts the daemon's unit first when it does not run.
    pub async fn connect_or_start(socket: &Path) -> Result<Self> {
        if tokio::net::UnixStream::connect(socket).await.is_err() {
            let manager = Manager::connect().await?;
            manager
                .start(DAEMON_UNIT, Duration::from_secs(60))
                .await
                .with_context(|| format!("the daemon does not run and {DAEMON_UNIT} cannot be started"))?;
        }
        Self::connect(socket).await
    }

    /// Calls a method and waits for its end, however long it takes; returns the lines it answers.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, method: &str) -> Result<Vec<String>, CallError> {
        let reply = self
            .connection
            .call_method(self.destination, PATH, Some(INTERFACE), method, &())
            .await
            .map_err(classify)?;
        // Methods answer with lines or with nothing.
        Ok(reply.body().deserialize().unwrap_or_default())
    }

    /// The status document.
    pub async fn status(&self) -> Result<Status> {
        let reply = self
            .connection
            .call_method(self.destination, PATH, Some("org.freedesktop.DBus.Properties"), "Get", &(INTERFACE, "Status"))
            .await
            .context("the daemon does not answer; see systemctl status node-image-pivotd.service")?;
        let value: OwnedVariant = reply.body().deserialize().context("the daemon's status")?;
        let text = String::try_from(value).context("the daemon's status is not a string")?;
        serde_json::from_str(&text).context("the daemon's status is of another version")
    }
}

fn classify(error: zbus::Error) -> CallError {
    let zbus::Error::MethodError(name, message, _) = &error else {
        return match error {
            zbus::Error::FDO(inner) => CallError::Failed(inner.to_string()),
            other => CallError::Disconnected(other.to_string()),
        };
    };
    let message = message.clone().unwrap_or_else(|| name.to_string());
    match name.as_str().rsplit('.').next() {
        Some("Refused") => CallError::Refused(message),
        Some("Permanent") => CallError::Permanent(message),
        Some("Cancelled") => CallError::Cancelled(message),
        _ => CallError::Failed(message),
    }
}
