//! The server of the interface on the private socket and on the system bus.

use std::borrow::Cow;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use zbus::connection::Builder;
use zbus::fdo::Properties;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, Guid};

use super::announced::Announced;
use super::service::Pivot;
use super::{INTERFACE, NAME, PATH, build};
use crate::agent::Agent;
use crate::report::{Phase, State, Status, Tracker};

/// Interval of the signals about the progress of a pull.
const PROGRESS: Duration = Duration::from_secs(1);
/// Time between attempts to reach a bus that is down or restarting.
const BUS_RETRY: Duration = Duration::from_secs(5);

/// Opens the private socket and serves it and the system bus in the background. When this returns, a client can connect.
///
/// # Errors
/// The socket cannot be created; the message names it.
pub async fn serve(agent: Arc<Agent>, socket: &Path) -> Result<()> {
    // The agent holds the daemon's lock, so an existing socket belongs to a daemon that has ended.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict {} to root", socket.display()))?;
    tokio::spawn(accept(listener, agent.clone()));
    tokio::spawn(system_bus(agent));
    Ok(())
}

async fn accept(listener: UnixListener, agent: Arc<Agent>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("private socket: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            let gone = CancellationToken::new();
            match private_connection(stream, Pivot { agent, gone: gone.clone() }).await {
                // Dropping the connection closes it.
                Ok(connection) => {
                    connection.closed().await;
                    gone.cancel();
                }
                Err(error) => debug!("a client of the private socket disconnected: {error:#}"),
            }
        });
    }
}

async fn private_connection(stream: tokio::net::UnixStream, pivot: Pivot) -> Result<Connection> {
    let stream = stream.into_std()?;
    build(Builder::unix_stream(stream).server(Guid::generate()).p2p().serve_at(PATH, pivot)).await
}

/// Owns the name on the system bus, and connects again after the bus has ended.
async fn system_bus(agent: Arc<Agent>) {
    let mut reported = false;
    loop {
        // Subscribed before clients can read a value, so that no later change is missed.
        let (tracker, watch) = (agent.tracker(), agent.tracker().watch());
        match bus_connection(agent.clone()).await {
            Ok(connection) => {
                reported = false;
                info!("{NAME} is on the system bus");
                tokio::select! {
                    () = connection.closed() => warn!("the system bus closed the connection; the pivot continues without it"),
                    ended = announce(&connection, tracker, watch) => {
                        let _ = ended.inspect_err(|error| debug!("cannot announce a change: {error:#}"));
                    }
                }
                // The watch of a running request's caller holds the connection, and with it the name.
                let _ = connection.close().await;
            }
            Err(error) if !reported => {
                reported = true;
                warn!("no system bus: {error:#}; status stays available to root on the private socket");
            }
            Err(_) => {}
        }
        tokio::time::sleep(BUS_RETRY).await;
    }
}

async fn bus_connection(agent: Arc<Agent>) -> Result<Connection> {
    let pivot = Pivot { agent, gone: CancellationToken::new() };
    build(Builder::system().serve_at(PATH, pivot).name(NAME)).await
}

/// Emits one PropertiesChanged, with the changed properties, for each change of the status document that changes a
/// property, and each second of a pull. Returns when the bus rejects a signal.
async fn announce(connection: &Connection, tracker: &Tracker, mut watch: watch::Receiver<Status>) -> Result<()> {
    let emitter = SignalEmitter::new(connection, PATH)?;
    let mut status = watch.borrow_and_update().clone();
    let mut last = Announced::from(&status);
    let mut tick = tokio::time::interval(PROGRESS);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // The counters of a pull change without a change of the document.
        let pulls = (status.phase, status.state) == (Some(Phase::Pull), State::Running);
        tokio::select! {
            changed = watch.changed() => if changed.is_err() { return Ok(()) },
            _ = tick.tick(), if pulls => {}
        }
        watch.mark_unchanged();
        status = tracker.status();
        let now = Announced::from(&status);
        let changes = now.changes(&last);
        if !changes.is_empty() {
            let interface = INTERFACE.try_into()?;
            Properties::properties_changed(&emitter, interface, changes, Cow::Borrowed(&[])).await?;
        }
        last = now;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use futures_util::StreamExt;
    use zbus::{MessageStream, OwnedVariant};

    use super::*;

    #[tokio::test]
    async fn a_change_is_announced_once_with_what_changed() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let server = Builder::unix_stream(ours).server(Guid::generate()).p2p().build();
        let (server, client) = tokio::join!(server, Builder::unix_stream(theirs).p2p().build());
        let (server, mut signals) = (server.unwrap(), MessageStream::from(client.unwrap()));
        let tracker = Tracker::new(Status::default());
        let watch = tracker.watch();
        let announced = tracker.clone();
        let announcing = tokio::spawn(async move { announce(&server, &announced, watch).await });
        // The first two change no property that is announced.
        tokio::task::yield_now().await;
        tracker.note("a line of the summary");
        tokio::task::yield_now().await;
        tracker.update(|status| status.state = State::Running);
        let message = signals.next().await.unwrap().unwrap();
        let (interface, changed, gone): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().unwrap();
        assert_eq!((interface.as_str(), gone.len()), (INTERFACE, 0));
        assert_eq!(changed.keys().collect::<Vec<_>>(), ["State"]);
        tracker.update(|status| status.undo_unix = Some(7));
        let message = signals.next().await.unwrap().unwrap();
        let (_, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().unwrap();
        assert_eq!(changed.keys().collect::<Vec<_>>(), ["UndoAt"], "one signal for each change");
        tracker.begin(Phase::Pull);
        signals.next().await.unwrap().unwrap();
        // A counter changes without a change of the document.
        tracker.progress.update(|now| now.bytes_total += 700);
        let message = signals.next().await.unwrap().unwrap();
        let (_, mut changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            message.body().deserialize().unwrap();
        let progress = HashMap::<String, u64>::try_from(changed.remove("Progress").unwrap()).unwrap();
        assert_eq!((progress["bytes_total"], changed.len()), (700, 0));
        announcing.abort();
    }
}
