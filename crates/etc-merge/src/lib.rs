//! The three-way merge of `/etc`.
//!
//! [`scan`] reads a tree, [`decide`] (pure) says what to do, [`diff()`] shows it, [`apply`] does it entry by entry
//! with a record, [`undo`] takes it back. The table is in `docs/etc-merge.md`. This room writes below the `/etc` it is
//! given and into the record's directory, nowhere else; it follows no symbolic link and enters no mount below `/etc`. It
//! may not mount anything, start programs, or know where the node image came from.

mod apply;
mod decide;
mod defaults;
mod diff;
mod name;
mod place;
mod plan;
mod record;
mod relabel;
mod report;
mod room;
mod scan;
mod snapshot;
mod staging;
mod survey;
mod undo;

#[cfg(test)]
mod tests;

pub use apply::{Labeler, apply, aside_dir, open_defaults, open_dir, refuse_conflicts};
pub use decide::decide;
pub use defaults::Defaults;
pub use diff::diff;
pub use name::Bytes;
pub use plan::{Change, Class, Decision, Origin, Plan};
pub use relabel::relabel;
pub use report::{NotDone, Report, UndoReport};
pub use room::check_room;
pub use scan::scan;
pub use snapshot::{Content, Entry, Leaf, Meta, Obstacle, Snapshot};
pub use survey::plan;
pub use undo::undo;
