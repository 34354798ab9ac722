//! Counters that a pull updates from any thread, and a plain snapshot of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use support::clock::boottime_ms;

use crate::layer_read::{LayerRead, Reading};
use crate::rate::Rate;

/// Live counters of a pull. Within one attempt no field decreases, except `bytes_total`.
#[derive(Debug, Default)]
pub struct PullProgress {
    /// Layers in the manifest.
    pub layers_total: AtomicU64,
    /// Layers that were fetched or are not needed.
    pub layers_done: AtomicU64,
    /// Compressed bytes of all layers that may have to be fetched. Set from the manifest, and reduced by each layer that
    /// turns out not to be needed. At the end it equals `bytes_fetched`.
    pub bytes_total: AtomicU64,
    /// Compressed bytes fetched.
    pub bytes_fetched: AtomicU64,
    /// Content objects that the booted repo lacks; 0 until the first layer is read.
    pub objects_wanted: AtomicU64,
    /// Content objects written.
    pub objects_done: AtomicU64,
    /// Bytes written to the node store.
    pub bytes_written: AtomicU64,
    /// Size of the wanted objects in the node store in bytes. It is an estimate if the commit does not list their sizes,
    /// and 0 until the first layer is read.
    pub bytes_needed: AtomicU64,
    rate: Mutex<Rate>,
    waiting_for: Mutex<Option<String>>,
    reads: Mutex<Vec<Arc<Mutex<LayerRead>>>>,
}

/// [`PullProgress`] at one instant.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are those of PullProgress
pub struct ProgressSnapshot {
    pub layers_total: u64,
    pub layers_done: u64,
    pub bytes_total: u64,
    pub bytes_fetched: u64,
    pub objects_wanted: u64,
    pub objects_done: u64,
    pub bytes_written: u64,
    #[serde(default)]
    pub bytes_needed: u64,
    /// Compressed bytes fetched per second, in the last ten seconds.
    #[serde(default)]
    pub bytes_per_second: u64,
}

impl PullProgress {
    /// Returns the current values of the counters.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (layers_total, bytes_fetched) = (get(&self.layers_total), get(&self.bytes_fetched));
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        ProgressSnapshot {
            layers_total,
            // A layer that counted as not needed may be read nevertheless.
            layers_done: get(&self.layers_done).min(layers_total),
            bytes_total: get(&self.bytes_total),
            bytes_fetched,
            objects_wanted: get(&self.objects_wanted),
            objects_done: get(&self.objects_done),
            bytes_written: get(&self.bytes_written),
            bytes_needed: get(&self.bytes_needed),
            bytes_per_second: rate.record(boottime_ms(), bytes_fetched),
        }
    }

    /// Sets the reason why the pull waits, such as a held lock, or `None` when it continues.
    pub fn wait_for(&self, reason: Option<String>) {
        *self.waiting_for.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Returns the reason why the pull waits, or `None` if it does not.
    pub fn waiting_for(&self) -> Option<String> {
        self.waiting_for.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins the read of a layer.
    pub(crate) fn begin_read(&self, index: usize, digest: String, size: u64) -> Reading {
        let reading = Reading::begin(index, digest, size);
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).push(reading.shared());
        reading
    }

    /// Returns the reads of layers since the last [`PullProgress::take_reads`], in the order in which they began.
    pub fn reads(&self) -> Vec<LayerRead> {
        let reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        reads.iter().map(|read| read.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    /// Returns the reads and forgets them. Reads that have not ended are not updated any more.
    pub fn take_reads(&self) -> Vec<LayerRead> {
        let reads = self.reads();
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).clear();
        reads
    }

    /// Adds to one counter.
    pub fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// Subtracts from one counter, and stops at 0.
    pub fn sub(counter: &AtomicU64, amount: u64) {
        // The closure always returns a value, so the update cannot fail.
        let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| Some(value.saturating_sub(amount)));
    }

    /// Sets all counters to 0, before another attempt. The reads of layers stay.
    pub fn reset(&self) {
        for counter in [
            &self.layers_total,
            &self.layers_done,
            &self.bytes_total,
            &self.bytes_fetched,
            &self.objects_wanted,
            &self.objects_done,
            &self.bytes_written,
            &self.bytes_needed,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        *self.rate.lock().unwrap_or_else(PoisonError::into_inner) = Rate::default();
        self.wait_for(None);
    }
}
