//! What systemd runs: which units run old code or are defined otherwise, what to do about each, and doing it.
//!
//! [`compare`] and [`plan()`] decide, purely; [`Root`] reads unit files, [`survey`] looks at what runs; [`Manager`] is
//! the only way to PID 1, but for [`Guard`], the one program that is started here: it re-executes PID 1 should we die when
//! `/usr` is not its own. This room may not mount, write `/etc` or talk to registries.

mod action;
mod definition;
mod difference;
mod files;
mod guard;
mod links;
mod manager;
mod names;
mod plan;
mod policy;
mod private;
mod processes;
mod running;
mod scripts;
mod syntax;

pub use action::{Action, Class, How, Verb};
pub use definition::{Definition, Entry, Settings, UnitDirectory, UnitFiles};
pub use difference::{Difference, compare};
pub use files::{EtcChanges, Root, release};
pub use guard::Guard;
pub use manager::Manager;
pub use plan::{Flow, Refusal, UnitState, plan, starts, undo_plan};
pub use policy::{NoWish, Policy, Wish};
pub use processes::{Version, mapped_files};
pub use running::{Definitions, Sides, active, active_fragments, definitions, survey};
