//! The systemd generator of node-image-pivot: decides if this boot is redirected to `node-image-pivot.target`.
//!
//! [`facts::gather`] reads the system, [`decide::decide`] is a pure function of these facts, and [`emit::redirect`] writes
//! the redirect. The binary only calls the three functions.
//!
//! The crate `boot-config` reads the inputs that the agent must read by the same rules. This crate does not use ostree,
//! D-Bus or the network: a generator runs before all of them, and its time is added to every boot and every daemon-reload.

pub mod decide;
pub mod emit;
pub mod facts;
pub mod installer;
pub mod kmsg;
