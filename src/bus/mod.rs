//! `org.nodeimage.Pivot1`: the daemon's interface and the client of it.
//!
//! The same interface is served twice: on the system bus (methods for root, properties for all, as
//! the bus policy says) and, without any bus, on a socket that only root can open. A dead bus costs
//! the public status API, never the pivot. This room calls `agent` and nothing below it.

mod announced;
mod client;
mod server;
mod service;

use std::time::Duration;

use anyhow::{Context, Result};
use zbus::Connection;
use zbus::connection::Builder;

pub use client::{CallError, Client};
pub use server::serve;

/// The well-known name on the system bus.
pub const NAME: &str = "org.nodeimage.Pivot1";
/// Where the object is.
pub const PATH: &str = "/org/nodeimage/Pivot1";
/// The interface; the same word as the name.
pub const INTERFACE: &str = "org.nodeimage.Pivot1";

/// How long connecting may take, the handshake included, and how long reading the status. A socket of systemd's takes
/// connections for a bus, or a daemon, that hangs or is not there.
const ANSWER: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 25 });

async fn build(builder: Builder<'_>) -> Result<Connection> {
    within(builder.build()).await
}

/// What is answered within [`ANSWER`], or an error that says how long was waited.
async fn within<T>(answer: impl Future<Output = zbus::Result<T>>) -> Result<T> {
    let answer = tokio::time::timeout(ANSWER, answer).await;
    Ok(answer.with_context(|| format!("no answer within {} s", ANSWER.as_secs()))??)
}
