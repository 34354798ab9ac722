//! Counters that a pull updates from any thread, and a plain snapshot of them.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use support::clock::boottime_ms;
use support::lock;

use crate::layer_read::{LayerRead, Reading};
use crate::rate::Rate;

/// Live counters of a pull. Within one attempt only `bytes_total` and `layers_done` can decrease, the latter when a layer is
/// read that counted as done.
#[derive(Debug, Default)]
pub struct PullProgress {
    counters: Mutex<ProgressSnapshot>,
    rate: Mutex<Rate>,
    waiting_for: Mutex<Option<String>>,
    reads: Mutex<Vec<Arc<Mutex<LayerRead>>>>,
}

/// The counters at one instant.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressSnapshot {
    /// Layers in the manifest.
    pub layers_total: u64,
    /// Layers that were fetched or are not needed.
    pub layers_done: u64,
    /// Compressed bytes of all layers that may have to be fetched. Set from the manifest, and reduced by each layer that
    /// turns out not to be needed. At the end it equals `bytes_fetched`.
    pub bytes_total: u64,
    /// Compressed bytes fetched.
    pub bytes_fetched: u64,
    /// Content objects that the booted repo lacks; 0 until the first layer is read.
    pub objects_wanted: u64,
    /// Content objects written.
    pub objects_done: u64,
    /// Bytes written to the node store.
    pub bytes_written: u64,
    /// Size of the wanted objects in the node store in bytes. It is an estimate if the commit does not list their sizes,
    /// and 0 until the first layer is read.
    #[serde(default)]
    pub bytes_needed: u64,
    /// Compressed bytes fetched per second, in the last ten seconds.
    #[serde(default)]
    pub bytes_per_second: u64,
}

impl PullProgress {
    /// Returns the current values of the counters.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let mut now = *lock(&self.counters);
        // A layer that counted as not needed may be read nevertheless.
        now.layers_done = now.layers_done.min(now.layers_total);
        let mut rate = lock(&self.rate);
        now.bytes_per_second = rate.record(boottime_ms(), now.bytes_fetched);
        now
    }

    /// Changes counters.
    pub fn update(&self, change: impl FnOnce(&mut ProgressSnapshot)) {
        change(&mut lock(&self.counters));
    }

    /// Reduces the bytes that may have to be fetched.
    pub(crate) fn reduce_total(&self, bytes: u64) {
        self.update(|now| now.bytes_total = now.bytes_total.saturating_sub(bytes));
    }

    /// Sets the reason why the pull waits, such as a held lock, or `None` when it continues.
    pub fn wait_for(&self, reason: Option<String>) {
        *lock(&self.waiting_for) = reason;
    }

    /// Returns the reason why the pull waits, or `None` if it does not.
    pub fn waiting_for(&self) -> Option<String> {
        lock(&self.waiting_for).clone()
    }

    /// Begins the read of a layer.
    pub(crate) fn begin_read(&self, index: usize, digest: String, size: u64) -> Reading {
        let reading = Reading::begin(index, digest, size);
        lock(&self.reads).push(reading.shared());
        reading
    }

    /// Returns the reads of layers since the last [`PullProgress::take_reads`], in the order in which they began.
    pub fn reads(&self) -> Vec<LayerRead> {
        let reads = lock(&self.reads);
        reads.iter().map(|read| lock(read).clone()).collect()
    }

    /// Returns the reads and forgets them. Reads that have not ended are not updated any more.
    pub fn take_reads(&self) -> Vec<LayerRead> {
        let reads = self.reads();
        lock(&self.reads).clear();
        reads
    }

    /// Sets all counters to 0, before another attempt. The reads of layers stay.
    pub fn reset(&self) {
        self.update(|now| *now = ProgressSnapshot::default());
        *lock(&self.rate) = Rate::default();
        self.wait_for(None);
    }
}
