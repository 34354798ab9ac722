//! A three-way merge of `/etc`: the defaults of the booted system, the defaults of the node image, and the current
//! state.
//!
//! [`plan()`] compares the three trees and decides on each path, [`diff()`] shows the plan, [`apply()`] carries it out
//! with an undo journal, and [`undo()`] restores the old state. `docs/etc-merge.md` has the table of decisions.
//!
//! The crate writes only below the given `/etc` and beside the undo journal. It does not follow symbolic links and does
//! not enter mounts below `/etc`. It does not mount anything and does not start programs.
//!
//! ```no_run
//! use std::os::fd::AsFd;
//! use std::path::Path;
//!
//! use etc_merge::{Defaults, apply, open_dir, plan, undo};
//!
//! # fn main() -> anyhow::Result<()> {
//! let [old, new, etc] = ["/usr/etc", "/run/new/usr/etc", "/etc"].map(|path| open_dir(Path::new(path)));
//! let (old, new, etc) = (old?, new?, etc?);
//! let plan = plan(old.as_fd(), new.as_fd(), etc.as_fd(), &Defaults::default())?;
//! println!("{}", apply(&plan, new.as_fd(), etc.as_fd(), Path::new("/run/example/etc-undo"))?);
//! println!("restored {} entries", undo(Path::new("/run/example/etc-undo"), etc.as_fd())?.restored);
//! # Ok(())
//! # }
//! ```

mod apply;
mod decide;
mod defaults;
mod diff;
mod journal;
mod name;
mod place;
mod plan;
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

pub use apply::{apply, open_defaults, open_dir, refuse_conflicts};
pub use defaults::Defaults;
pub use diff::diff;
pub use name::Bytes;
pub use plan::{Change, Class, Decision, Origin, Plan};
pub use relabel::relabel;
pub use report::{NotDone, Report, UndoReport};
pub use room::check_room;
pub use snapshot::{Content, Leaf, Meta};
pub use survey::plan;
pub use undo::undo;
