//! Reads the layers of an encapsulated commit: archives whose entries are objects of an ostree repo.

mod entry;
mod reader;

pub(super) use entry::{Role, role};
pub(super) use reader::{Consumed, Purpose, consume, tar_failure};
