//! The status document, and its forms as text: progress, timeline and summary.
//!
//! D-Bus, command line, console and `systemctl status` show views of one [`Status`]. The module writes only one file, the
//! service record, and does not act on the system otherwise.

mod diagnosis;
mod document;
mod outcome;
mod plot;
mod service_record;
mod status;
mod table;
mod text;
mod timeline;
mod tracker;
mod usage;

pub use document::Report;
pub use outcome::{Outcome, Reason, Standing};
pub use plot::plot;
pub use service_record::{ServiceRecord, unit_of};
pub use status::{Attempt, LastError, Phase, StaleUnit, State, Status, TimelineEntry};
pub use table::summary;
pub use text::{old_lines, one_line, state_line, waiting_line};
pub use timeline::{SpanResult, Subject, Timeline};
pub use tracker::{Remark, Tracker};
