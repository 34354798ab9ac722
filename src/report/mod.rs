//! The status document, and its forms as text: progress, timeline and summary.
//!
//! D-Bus, command line, console and `systemctl status` show views of one [`Status`]. The module also names and explains the
//! refusals. It writes only one file, the service record, and does not act on the system otherwise.

mod diagnosis;
mod document;
mod outcome;
mod phase;
mod plot;
mod refusal_id;
mod service_record;
mod status;
mod table;
mod text;
mod timeline;
mod tracker;
mod usage;
mod words;

pub use diagnosis::Diagnosis;
pub use document::Report;
pub use node_store::SpanResult;
pub use outcome::{Outcome, Reason, Standing};
pub use phase::Phase;
pub use plot::plot;
pub use refusal_id::{RefusalId, explanations};
pub use service_record::{ServiceRecord, unit_of};
pub use status::{AgentState, Attempt, LastError, StaleUnit, State, Status, TimelineEntry};
pub use table::summary;
pub use text::{deviation_lines, old_lines, state_line, status_line, waiting_line};
pub use timeline::{Subject, Timeline};
pub use tracker::{Remark, Tracker};
pub use words::one_line;
