//! Undoes a switch on trial unless an administrator keeps it in time.

mod timer;
mod trial;

pub(super) use timer::{arm, armed, disarm};
pub use trial::TrialPeriod;
pub(super) use trial::watch;
