//! Serving the interface on the private socket and on the system bus.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use zbus::connection::Builder;
use zbus::object_server::InterfaceRef;
use zbus::{Connection, Guid};

use super::service::Pivot;
use super::{NAME, PATH, build};
use crate::agent::Agent;

/// How often a bus that is down or restarting is tried again.
const BUS_RETRY: Duration = Duration::from_secs(5);

/// Opens the private socket and starts serving both ways in the background. When this returns, a
/// client can connect.
///
/// # Errors
/// The socket cannot be made: the message names it.
pub async fn serve(agent: Arc<Agent>, socket: &Path) -> Result<()> {
    // The agent holds the lock of the one daemon: a socket that is there is a dead one's.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot close {} to others", socket.display()))?;
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
                // The connection lives as long as somebody holds it.
                Ok(connection) => {
                    connection.closed().await;
                    gone.cancel();
                }
                Err(error) => debug!("a client of the private socket went away: {error:#}"),
            }
        });
    }
}

async fn private_connection(stream: tokio::net::UnixStream, pivot: Pivot) -> Result<Connection> {
    let stream = stream.into_std()?;
    build(Builder::unix_stream(stream).server(Guid::generate()).p2p().serve_at(PATH, pivot)).await
}

/// Keeps the name on the system bus, for as long as there is one.
async fn system_bus(agent: Arc<Agent>) {
    let mut told = false;
    loop {
        match bus_connection(agent.clone()).await {
            Ok(connection) => {
                told = false;
                info!("{NAME} is on the system bus");
                tokio::select! {
                    () = connection.closed() => warn!("the system bus went away; the pivot goes on without it"),
                    () = announce(&connection, &agent) => {}
                }
            }
            Err(error) if !told => {
                told = true;
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

/// Emits PropertiesChanged whenever the status document changes. Ends when the bus refuses.
async fn announce(connection: &Connection, agent: &Agent) {
    let mut watch = agent.tracker().watch();
    while watch.changed().await.is_ok() {
        watch.borrow_and_update();
        let object: zbus::Result<InterfaceRef<Pivot>> = connection.object_server().interface(PATH).await;
        let Ok(object) = object else { return };
        let pivot = object.get().await;
        let emitter = object.signal_emitter();
        let sent = async {
            pivot.state_changed(emitter).await?;
            pivot.phase_changed(emitter).await?;
            pivot.last_error_changed(emitter).await?;
            pivot.undo_at_changed(emitter).await?;
            pivot.timeline_changed(emitter).await
        };
        if let Err(error) = sent.await {
            debug!("cannot announce a change: {error}");
            return;
        }
    }
}
