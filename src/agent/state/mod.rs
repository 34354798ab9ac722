//! The agent's state files: the record, the plans, and their paths.

mod etc_plan;
mod paths;
mod plan;
mod record;
mod salvage;

pub(super) use etc_plan::load_etc_plan;
pub use paths::Paths;
pub(super) use plan::{EtcPlan, MemoryPlan};
pub use plan::{PlanDocument, SwitchPlan};
#[cfg(test)]
pub(super) use record::tests::switched;
pub(super) use record::{Asked, Source, shown};
pub use record::{Record, StagedRoot, Step, Switched, Undo};
pub(super) use salvage::{open, repair_undo_plan, set_aside, unused};
