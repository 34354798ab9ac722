//! One bound on the memory that the plain layers of an image take together. Pure.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most that the lists of all plain layers and the tree made of them may take, in bytes. With it a pull stays
/// within the 150 MiB that [`super`] states.
const MOST: usize = 80 << 20;

/// How to build an image that fits.
pub(super) const ADVICE: &str = "build the image with fewer files in plain layers, or encapsulate its tree as a commit";

/// Shared by all plain layers of one import.
#[derive(Debug, Clone, Default)]
pub(super) struct Budget(Arc<Spent>);

#[derive(Debug, Default)]
struct Spent {
    bytes: AtomicUsize,
    entries: AtomicUsize,
}

/// One more entry does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "exceeds the limit: the image's plain layers list {entries} entries so far, and their lists may take {} MiB of memory",
    MOST >> 20
)]
pub(super) struct OverBudget {
    entries: usize,
}

/// What one layer or tree has taken of the budget; given back when dropped.
#[derive(Debug, Default)]
pub(super) struct Share {
    budget: Budget,
    bytes: usize,
    entries: usize,
}

impl Budget {
    /// Starts a share of nothing.
    pub(super) fn share(&self) -> Share {
        Share { budget: self.clone(), bytes: 0, entries: 0 }
    }
}

impl Share {
    /// Takes so many bytes for so many more entries.
    pub(super) fn take(&mut self, bytes: usize, entries: usize) -> Result<(), OverBudget> {
        let Spent { bytes: all, entries: count } = &*self.budget.0;
        self.bytes += bytes;
        self.entries += entries;
        let count = count.fetch_add(entries, Ordering::Relaxed) + entries;
        if all.fetch_add(bytes, Ordering::Relaxed) + bytes > MOST {
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
    fn one_budget_for_all_layers() {
        let budget = Budget::default();
        let (mut one, mut other) = (budget.share(), budget.share());
        one.take(MOST / 2, 3).unwrap();
        other.take(MOST / 2, 4).unwrap();
        let error = other.take(1, 1).unwrap_err();
        assert!(error.to_string().contains("list 8 entries") && error.to_string().contains("80 MiB"), "{error}");
        drop(one);
        other.take(1, 1).unwrap();
    }
}
