//! Limits the memory that all plain layers of an image use together. Pure.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Limit in bytes for the lists of all plain layers and the merged tree. It keeps a pull within the 170 MiB that
/// [`super`] states.
const LIMIT: usize = 80 << 20;

/// Advice for images that exceed the budget.
pub(super) const ADVICE: &str = "build the image with fewer files in plain layers, or encapsulate its tree as a commit";

/// Memory budget that all plain layers of one import share.
#[derive(Debug, Clone, Default)]
pub(super) struct Budget(Arc<Spent>);

#[derive(Debug, Default)]
struct Spent {
    bytes: AtomicUsize,
    entries: AtomicUsize,
}

/// Error returned when an entry exceeds the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "exceeds the limit of {} MiB for the lists of all plain layers: they have {entries} entries so far",
    LIMIT >> 20
)]
pub(super) struct OverBudget {
    entries: usize,
}

/// Part of the budget that one layer or tree uses; returned on drop.
#[derive(Debug, Default)]
pub(super) struct Share {
    budget: Budget,
    bytes: usize,
    entries: usize,
}

impl Budget {
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
        let Spent { bytes: all, entries: count } = &*self.budget.0;
        self.bytes += bytes;
        self.entries += entries;
        let count = count.fetch_add(entries, Ordering::Relaxed) + entries;
        if all.fetch_add(bytes, Ordering::Relaxed) + bytes > LIMIT {
            return Err(OverBudget { entries: count });
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
        one.take(LIMIT / 2, 3).unwrap();
        other.take(LIMIT / 2, 4).unwrap();
        let error = other.take(1, 1).unwrap_err();
        assert!(error.to_string().contains("have 8 entries") && error.to_string().contains("80 MiB"), "{error}");
        drop(one);
        other.take(1, 1).unwrap();
    }
}
