//! What we say: the status document, progress, the timeline and its summary.
//!
//! Everything shown anywhere (D-Bus, CLI, console, `systemctl status`) is a view of one
//! [`Status`]. This room may not act on the system; the one file that it writes is the service record.

mod outcome;
mod service_record;
mod status;
mod text;
mod tracker;

pub use outcome::{Outcome, Reason, Standing};
pub use service_record::{ServiceRecord, unit_of};
pub use status::{Attempt, Cost, LastError, Phase, State, Status, StillOld, TimelineEntry};
pub use text::{old_lines, one_line, progress_line, state_line, summary, waiting_line};
pub use tracker::{Beside, Remark, Tracker};
