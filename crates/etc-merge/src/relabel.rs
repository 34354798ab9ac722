//! Sets SELinux labels that the kernel refused when the merge wrote its entries.
//!
//! The kernel can refuse a label that the loaded policy does not know even to a process that may write it. On live
//! media `/etc` is an overlay, and the kernel also checks the process that mounted the overlay. After the new policy is
//! loaded, the label can be set like any other.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};

use super::place::Place;
use super::plan::Plan;

/// Sets the labels in `plan` on entries that still equal the plan's version. Returns the number of changed labels.
/// Entries that have their label are not changed, so a second call does nothing.
///
/// # Errors
/// A label cannot be set; the message has the path. The labels of earlier entries are set.
pub fn relabel(plan: &Plan, etc_dir: BorrowedFd<'_>) -> Result<usize> {
    let mut relabelled = 0;
    for change in &plan.changes {
        let (Some(label), Some(after)) = (&change.label, &change.after) else { continue };
        let named = || format!("cannot relabel /etc/{}", change.path);
        let Some(place) = Place::find(etc_dir, &change.path).with_context(named)? else { continue };
        if place.look().with_context(named)?.as_ref() != Some(after) {
            continue;
        }
        if place.label_and_mtime().with_context(named)?.0.as_ref() != Some(label) {
            place.set_label(&label.0).with_context(named)?;
            relabelled += 1;
        }
    }
    Ok(relabelled)
}
