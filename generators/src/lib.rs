//! The boot half of node-image-pivot: decides if this boot goes to `node-image-pivot.target` first.
//!
//! [`facts::gather`] reads the system, [`decide::decide`] is a pure function of what was read, and
//! [`emit::redirect`] writes the answer. The binary only glues the three together.
//!
//! What the agent reads by the same rules is in `boot-config`. Nothing here knows ostree, D-Bus or the network: a
//! generator runs before all of them, and its time is added to every boot and every daemon-reload.

pub mod decide;
pub mod emit;
pub mod facts;
pub mod kmsg;
