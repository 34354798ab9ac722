//! The three-way merge of `/etc`.
//!
//! [`scan`] reads a tree, [`decide`] (pure) says what to do, [`apply`] does it entry by entry with a
//! record, [`undo`] takes it back. This room writes below the `/etc` it is given and into the record's
//! directory, nowhere else; it follows no symbolic link and enters no mount below `/etc`. It may not
//! mount anything, start programs, or know where the node image came from.

mod decide;
mod name;
mod plan;
mod scan;
mod snapshot;
pub(crate) mod xattr;

#[cfg(test)]
mod tests;

pub use decide::decide;
pub use name::Bytes;
pub use plan::{Change, Class, Decision, Origin, Plan};
pub use scan::scan;
pub use snapshot::{Content, Entry, Leaf, Meta, Snapshot};
