//! `org.nodeimage.Pivot1`: the daemon's interface and the client of it.
//!
//! The same interface is served twice: on the system bus (methods for root, properties for all, as
//! the bus policy says) and, without any bus, on a socket that only root can open. A dead bus costs
//! the public status API, never the pivot. This room calls `agent` and nothing below it.

mod client;
mod server;
mod service;

pub use client::{CallError, Client};
pub use server::serve;

/// The well-known name on the system bus.
pub const NAME: &str = "org.nodeimage.Pivot1";
/// Where the object is.
pub const PATH: &str = "/org/nodeimage/Pivot1";
/// The interface; the same word as the name.
pub const INTERFACE: &str = "org.nodeimage.Pivot1";
