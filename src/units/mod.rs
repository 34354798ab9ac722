//! What systemd runs: which units still run old code, what to do about each, and doing it.
//!
//! [`plan`] decides, purely; [`Manager`] is the only way to PID 1, but for [`Guard`], the one program that is
//! started here: it re-executes PID 1 should we die in an undo. This room may not mount, write `/etc` or talk to
//! registries.

mod guard;
mod manager;
mod plan;
mod private;
mod running;

pub use guard::Guard;
pub use manager::Manager;
pub use plan::{Action, Class, Flow, RunningUnit, plan, undo_plan};
pub use running::{Version, active_fragments, mapped_files, survey};
