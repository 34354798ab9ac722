//! Limits the memory that all plain layers of an image use together. A system of 200,000 files needs about 110 MiB; a hostile
//! image can list millions. Pure.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Least limit in bytes for the lists of all plain layers and the merged tree. It keeps a pull within the 170 MiB that
/// [`super`] states.
const LEAST: usize = 80 << 20;
/// Largest limit in bytes, which permits about a million files.
const MOST: usize = 640 << 20;
/// Part of the machine's memory that is the limit between these bounds.
const PART: u64 = 16;

/// Advice for images that exceed the budget.
pub(super) const ADVICE: &str = "build the image with fewer files in plain layers, or encapsulate its tree as a commit";

/// Memory budget that all plain layers of one import share.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<Spent>);

#[derive(Debug)]
struct Spent {
    limit: usize,
    bytes: AtomicUsize,
    entries: AtomicUsize,
}

/// Error returned when an entry exceeds the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "exceeds the limit of {} MiB for the lists of all plain layers: they have {entries} entries so far",
    limit >> 20
)]
pub(super) struct OverBudget {
    entries: usize,
    limit: usize,
}

/// Part of the budget that one layer or tree uses; returned on drop.
#[derive(Debug, Default)]
pub(super) struct Share {
    budget: Budget,
    bytes: usize,
    entries: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(LEAST)
    }
}

impl Budget {
    /// Returns a budget of `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self(Arc::new(Spent { limit, bytes: AtomicUsize::new(0), entries: AtomicUsize::new(0) }))
    }

    /// Returns the budget on a machine with `memory` bytes.
    pub(super) fn on_machine(memory: u64) -> Self {
        Self::new(usize::try_from(memory / PART).unwrap_or(MOST).clamp(LEAST, MOST))
    }

    /// Returns an empty share.
    pub(super) fn share(&self) -> Share {
        Share { budget: self.clone(), bytes: 0, entries: 0 }
    }
}

impl Share {
    /// Adds `bytes` for `entries` more entries to the share.
    ///
    /// # Errors
    /// If all shares together exceed the limit.
    pub(super) fn take(&mut self, bytes: usize, entries: usize) -> Result<(), OverBudget> {
        let Spent { limit, bytes: all, entries: count } = &*self.budget.0;
        self.bytes += bytes;
        self.entries += entries;
        let count = count.fetch_add(entries, Ordering::Relaxed) + entries;
        if all.fetch_add(bytes, Ordering::Relaxed) + bytes > *limit {
            return Err(OverBudget { entries: count, limit: *limit });
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.0.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.0.entries.fetch_sub(self.entries, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn all_layers_share_one_budget() {
        let budget = Budget::default();
        let (mut one, mut other) = (budget.share(), budget.share());
        one.take(LEAST / 2, 3).unwrap();
        other.take(LEAST / 2, 4).unwrap();
        let error = other.take(1, 1).unwrap_err();
        assert!(error.to_string().contains("have 8 entries") && error.to_string().contains("80 MiB"), "{error}");
        drop(one);
        other.take(1, 1).unwrap();
    }

    #[test]
    fn the_limit_is_a_part_of_the_memory_between_two_bounds() {
        for (memory, limit) in
            [(0, LEAST), (1 << 30, LEAST), (4 << 30, 256 << 20), (8 << 30, 512 << 20), (u64::MAX, MOST)]
        {
            assert_eq!(Budget::on_machine(memory).0.limit, limit, "{memory}");
        }
    }
}
