//! The status document, and its forms as text: progress, timeline and summary.
//!
//! D-Bus, command line, console and `systemctl status` show views of one [`Status`]. The module writes only one file, the
//! service record, and does not act on the system otherwise.

mod outcome;
mod service_record;
mod status;
mod text;
mod tracker;

pub use outcome::{Outcome, Reason, Standing};
pub use service_record::{ServiceRecord, unit_of};
pub use status::{Attempt, LastError, Phase, StaleUnit, State, Status, TimelineEntry};
pub use text::{old_lines, one_line, state_line, summary, waiting_line};
pub use tracker::{Remark, Tracker};
