//! The times of one read of a layer, which its task and its threads update.

use std::sync::{Arc, Mutex};

use support::clock::{boottime_ms, thread_cpu_ms};
use support::lock;

/// One read of a layer. Its three parts run at the same time. Times are milliseconds of the boot-time clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRead {
    /// Position in the manifest.
    pub index: usize,
    /// Digest of the blob.
    pub digest: String,
    /// Compressed size of the layer.
    pub size: u64,
    /// The transfer from the registry.
    pub fetch: Work,
    /// The decompression and the diff id, in one thread.
    pub decompress: Option<Work>,
    /// The parsing, hashing and writing of objects, in one thread.
    pub write: Option<Work>,
    /// The end; absent while the layer is read.
    pub result: Option<LayerResult>,
}

/// One part of a read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Begin.
    pub start_ms: u64,
    /// End, or the last progress of a transfer.
    pub end_ms: u64,
    /// Bytes that the part received (fetch) or returned (decompress, write).
    pub bytes: u64,
    /// CPU time of the thread; 0 for a transfer, which skopeo does.
    pub cpu_ms: u64,
}

/// The end of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerResult {
    /// The layer was read to its end and checked.
    Done,
    /// No object of it was wanted any more.
    NotNeeded,
    /// The read failed.
    Failed,
    /// A cancel or the failure of another layer ended the read.
    Interrupted,
}

/// A part that runs in a thread.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Decompress,
    Write,
}

/// A read that is under way. A value that is dropped without an end counts as interrupted.
pub(crate) struct Reading(Arc<Mutex<LayerRead>>);

impl Reading {
    pub(crate) fn begin(index: usize, digest: String, size: u64) -> Self {
        let now = boottime_ms();
        let fetch = Work { start_ms: now, end_ms: now, ..Work::default() };
        let read = LayerRead { index, digest, size, fetch, decompress: None, write: None, result: None };
        Self(Arc::new(Mutex::new(read)))
    }

    pub(crate) fn shared(&self) -> Arc<Mutex<LayerRead>> {
        self.0.clone()
    }

    /// Sets the bytes that have arrived.
    pub(crate) fn fetched(&self, bytes: u64) {
        let fetch = &mut lock(&self.0).fetch;
        (fetch.bytes, fetch.end_ms) = (bytes, boottime_ms());
    }

    /// Returns the timer of a part, for its thread.
    pub(crate) fn timer(&self, part: Part) -> Timer {
        Timer { read: self.shared(), part, start_ms: 0, cpu_ms: 0 }
    }

    /// Ends the read.
    pub(crate) fn end(self, result: LayerResult) {
        lock(&self.0).result = Some(result);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        lock(&self.0).result.get_or_insert(LayerResult::Interrupted);
    }
}

/// Measures one part, in the thread that does it.
pub(crate) struct Timer {
    read: Arc<Mutex<LayerRead>>,
    part: Part,
    start_ms: u64,
    cpu_ms: u64,
}

impl Timer {
    /// Begins in the thread that does the part.
    pub(crate) fn begin(self) -> Self {
        Self { start_ms: boottime_ms(), cpu_ms: thread_cpu_ms(), ..self }
    }

    /// Ends with the bytes that the part returned.
    pub(crate) fn end(self, bytes: u64) {
        let (end_ms, cpu_ms) = (boottime_ms(), thread_cpu_ms().saturating_sub(self.cpu_ms));
        let work = Some(Work { start_ms: self.start_ms, end_ms, bytes, cpu_ms });
        let mut read = lock(&self.read);
        match self.part {
            Part::Decompress => read.decompress = work,
            Part::Write => read.write = work,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::PullProgress;

    use super::*;

    #[test]
    fn a_read_has_its_parts_and_its_end() {
        let progress = PullProgress::default();
        let reading = progress.begin_read(3, "sha256:0".into(), 9);
        reading.fetched(7);
        reading.timer(Part::Write).begin().end(5);
        progress.reset();
        let [read] = &progress.reads()[..] else { panic!("one read, also after a reset of the counters") };
        assert_eq!((read.index, read.fetch.bytes, read.write.map(|write| write.bytes)), (3, 7, Some(5)));
        assert_eq!((read.decompress, read.result), (None, None), "the read is under way");
        reading.end(LayerResult::Done);
        drop(progress.begin_read(4, "sha256:1".into(), 9));
        let results: Vec<_> = progress.take_reads().into_iter().map(|read| read.result).collect();
        assert_eq!(results, [Some(LayerResult::Done), Some(LayerResult::Interrupted)]);
        assert_eq!(progress.reads(), []);
    }
}
