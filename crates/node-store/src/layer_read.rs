//! The times of one read of a layer, which its task and its threads update.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use support::clock::{boottime_ms, thread_cpu_ms};
use support::lock;

/// One read of a layer. Its three parts run at the same time. Times are milliseconds of the boot-time clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LayerRead {
    /// Position in the manifest.
    pub index: usize,
    /// Digest of the blob. The timeline has only its first letters.
    pub digest: String,
    /// Compressed size of the layer in bytes.
    pub size: u64,
    /// The transfer from the registry.
    pub fetch: Work,
    /// The decompression and the diff id, in one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decompress: Option<Work>,
    /// The parsing, hashing and writing of objects, in one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<Work>,
    /// Result; absent while it is under way.
    pub result: Option<SpanResult>,
}

impl LayerRead {
    /// Returns the end of the last part.
    pub fn end_ms(&self) -> u64 {
        [self.decompress, self.write].into_iter().flatten().fold(self.fetch.end_ms, |end, part| end.max(part.end_ms))
    }

    /// Returns the time from the begin to the end of the last part.
    pub fn duration_ms(&self) -> u64 {
        self.end_ms().saturating_sub(self.fetch.start_ms)
    }
}

/// One part of a read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Work {
    /// Begin.
    pub start_ms: u64,
    /// End, or the last progress of a transfer.
    pub end_ms: u64,
    /// Bytes that the part received (fetch) or returned (decompress, write).
    pub bytes: u64,
    /// CPU time of its thread; absent for a transfer, which skopeo does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
}

/// The end of a read, or of another span of the timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SpanResult {
    /// It reached its goal.
    Done,
    /// It failed.
    Failed,
    /// A cancel, the failure of another part or the end of the agent stopped it.
    Interrupted,
    /// Nothing of it was needed any more.
    NotNeeded,
    /// A result of another version of the agent.
    #[serde(other)]
    Other,
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
    pub(crate) fn end(self, result: SpanResult) {
        lock(&self.0).result = Some(result);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        lock(&self.0).result.get_or_insert(SpanResult::Interrupted);
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
        let work = Some(Work { start_ms: self.start_ms, end_ms, bytes, cpu_ms: Some(cpu_ms) });
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
        reading.end(SpanResult::Done);
        drop(progress.begin_read(4, "sha256:1".into(), 9));
        let results: Vec<_> = progress.take_reads().into_iter().map(|read| read.result).collect();
        assert_eq!(results, [Some(SpanResult::Done), Some(SpanResult::Interrupted)]);
        assert_eq!(progress.reads(), []);
    }
}
