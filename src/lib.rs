//! node-image-pivot turns a running base-only system into the cluster's node image, without a reboot.
//!
//! The crate is split into rooms, one directory each; every room's `mod.rs` says what it is for and
//! what it may not do. Data flows one way through six phases: resolve, pull, stage, switch, refresh,
//! finish. Each phase takes the previous phase's value, so a wrong order does not compile.

pub mod agent;
pub mod bus;
pub mod cli;
pub mod config;
pub mod host;
pub mod preflight;
pub mod report;
