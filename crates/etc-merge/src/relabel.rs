//! Security labels that could not be set when the merge wrote its entries.
//!
//! A label that the loaded policy does not know can be refused even to a process that may write it: where `/etc` is an
//! overlay, as on live media, the kernel asks again whether whoever mounted that may. Once the new policy is loaded
//! there is nothing special about such a label.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};

use super::place::Place;
use super::plan::Plan;

/// Gives entries that the plan wrote, and that are still what it says, the label that it has for them. Returns how many
/// got one; an entry that has its label is not touched, so doing it again does nothing.
///
/// # Errors
/// When a label cannot be set. The entry is named; those before it have theirs.
pub fn relabel(plan: &Plan, etc_dir: BorrowedFd<'_>) -> Result<usize> {
    let mut relabelled = 0;
    for change in &plan.changes {
        let (Some(label), Some(after)) = (&change.label, &change.after) else { continue };
        let named = || format!("/etc/{}", change.path);
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
