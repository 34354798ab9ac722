//! node-image-pivot turns a running base-only system into the cluster's node image, without a reboot.
//!
//! This crate is the agent: the daemon with its record and its six phases (resolve, pull, stage, switch, refresh, finish),
//! its D-Bus interface and the command line. The crates below `crates/` do the work of the phases;
//! `docs/architecture.md` lists them. Each phase needs the value that the previous one returns, so a wrong order does not
//! compile.

mod agent;
mod bus;
pub mod cli;
mod config;
mod host;
mod pack;
mod preflight;
mod report;
