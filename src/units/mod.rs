//! What systemd runs: which units still run old code, what to do about each, and doing it.
//!
//! [`plan`] decides, purely; [`Manager`] is the only way to PID 1. This room may not mount, write
//! `/etc` or talk to registries.

mod guard;
mod manager;
mod plan;
mod private;
mod running;

pub use guard::Guard;
pub use manager::Manager;
pub use plan::{Action, Class, Flow, RunningUnit, plan, undo_plan};
pub use running::{Version, active_fragments, mapped_files, survey};
