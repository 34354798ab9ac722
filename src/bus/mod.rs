//! `org.nodeimage.Pivot1`: the daemon's D-Bus interface and its client.
//!
//! The daemon serves the same interface twice: on the system bus, where the bus policy allows methods to root and
//! properties to all users, and on a private socket that only root can open. Without a bus only the public status is
//! unavailable; the pivot continues.

mod announced;
mod caller;
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
/// Path of the object.
pub const PATH: &str = "/org/nodeimage/Pivot1";
/// Name of the interface, the same as the well-known name.
pub const INTERFACE: &str = "org.nodeimage.Pivot1";

/// Time limit for connecting, including the handshake, and for reading the status. A socket that systemd listens on
/// accepts connections even if the bus or the daemon behind it hangs or does not run.
const ANSWER: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 25 });

async fn build(builder: Builder<'_>) -> Result<Connection> {
    within(builder.build()).await
}

/// Returns the answer if it arrives within [`ANSWER`], else an error that names the limit.
async fn within<T>(answer: impl Future<Output = zbus::Result<T>>) -> Result<T> {
    let answer = tokio::time::timeout(ANSWER, answer).await;
    Ok(answer.with_context(|| format!("no answer within {} s", ANSWER.as_secs()))??)
}
