//! The agent's state files: their directory, the envelope that they share, the record and the plans.

mod dir;
mod file;
mod plan;
mod record;
mod salvage;
mod step;
mod switch_step;
mod timeline;

pub use dir::StateDir;
#[cfg(test)]
pub(super) use file::tests::survives_every_damage;
pub use file::{Checksum, StateFile, Unusable, if_present};
pub(super) use plan::{EtcPlan, MemoryPlan};
pub use plan::{PlanDocument, SwitchPlan};
pub use record::Record;
#[cfg(test)]
pub(super) use record::tests::{refreshed, staged};
pub(super) use record::{Asked, shown};
pub(super) use salvage::{open, repair_undo_plan, set_aside, unused};
pub use step::{Finished, Refreshed, StagedRoot, Step, Switched, Undo, UndoTree};
pub use switch_step::{FileStep, LiveStep, SwitchStep};
pub(super) use timeline::{load_timeline, save_timeline};
