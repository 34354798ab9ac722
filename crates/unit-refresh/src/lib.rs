//! Works out which systemd units run old code or have a changed definition after `/usr` was replaced, plans an action
//! for each, and runs it.
//!
//! [`compare`] and [`plan()`] are pure. [`Root`] reads unit files, and [`survey`] inspects the active units. All requests
//! to PID 1 go through [`Manager`], except that [`Guard`] re-executes PID 1 if the agent dies during a switch.
//! This crate mounts nothing and writes nothing to `/etc`.
//!
//! ```
//! use unit_refresh::{Class, Difference, Flow, Policy, UnitState, plan};
//!
//! let unit = UnitState {
//!     name: "a.service".into(),
//!     difference: Difference::Changed(vec!["[Service] User=".into()]),
//!     ..UnitState::default()
//! };
//! let actions = plan(&[unit], Flow::Bootstrap, &Policy::default());
//! assert_eq!((actions[0].class, actions[0].reason.as_str()), (Class::Restart, "[Service] User= changed in its unit"));
//! ```

mod action;
mod definition;
mod difference;
mod ending;
mod files;
mod guard;
mod jobs;
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
mod unit;
mod units;

pub use action::{Action, Class, How, SocketOf, Verb};
pub use definition::{Definition, UnitFiles};
pub use difference::{Difference, compare};
pub use ending::holds;
pub use files::{EtcChanges, Root, release};
pub use guard::Guard;
pub use manager::Manager;
pub use names::mount_unit;
pub use plan::{Flow, plan, starts, undo_plan};
pub use policy::{NoWish, Policy, Wish};
pub use processes::{Version, mapped_files};
pub use running::{Definitions, Sides, active, active_fragments, definitions, survey};
pub use unit::{Kind, Listens, Refusal, Reload, Role, Service, UnitState};
