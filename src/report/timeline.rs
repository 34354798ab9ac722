//! The timeline: phases, their steps, hooks, unit jobs, waits and reads of layers, each with begin, end and result.
//!
//! Plain data. Times are milliseconds of the boot-time clock, which cannot be set: a machine without a battery gets its
//! time while it pulls.

use node_store::{LayerRead, SpanResult};
use serde::{Deserialize, Serialize};

/// Largest number of waits; the earliest are merged.
const WAITS: usize = 64;
/// Largest number of other spans; the earliest that have ended are dropped.
const SPANS: usize = 1000;
/// Largest number of reads of layers; the earliest are dropped.
const LAYERS: usize = 2000;
/// Letters of a digest that the timeline keeps, `sha256:` included.
const DIGEST: usize = 19;

/// All that the agent did for one image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Timeline {
    /// Everything but layers, in the order of the begins.
    pub spans: Vec<Span>,
    /// The reads of layers. A layer whose read failed is read again by the next attempt.
    #[serde(default)]
    pub layers: Vec<LayerRead>,
    /// Number of entries that are not listed, because there were too many.
    #[serde(default)]
    pub dropped: u64,
}

/// The subject of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, strum::IntoStaticStr)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Subject {
    /// A phase, by its name.
    Phase,
    /// A pause before another attempt, by the class of the failure.
    Wait,
    /// A step of the switch, by its name.
    Step,
    /// The step that mounts the new `/usr`. Its end is the moment of the switch.
    Mount,
    /// A hook, by its name.
    Hook,
    /// A job of systemd: its type and its unit.
    Job,
    /// An undo or a rollback.
    Undo,
    /// A step of an undo, by its name.
    UndoStep,
    /// A subject of another version of the agent.
    #[serde(other)]
    Other,
}

/// One activity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Span {
    /// Its kind.
    pub subject: Subject,
    /// Its name within the kind.
    pub name: String,
    /// Begin.
    pub start_ms: u64,
    /// End; absent while it is under way.
    pub end_ms: Option<u64>,
    /// Result; absent while it is under way.
    pub result: Option<SpanResult>,
    /// Message of the failure, or the reason of a wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Compressed bytes fetched; of a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// CPU time of the agent and the programs that it ran; of a phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_ms: Option<u64>,
    /// Largest resident memory of the agent itself; of a phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// Number of waits that this one stands for, if more than one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<u32>,
}

impl Span {
    fn begin(subject: Subject, name: String, start_ms: u64) -> Self {
        let (end_ms, result, detail, bytes) = (None, None, None, None);
        let (cpu_ms, peak_memory_bytes, merged) = (None, None, None);
        Self { subject, name, start_ms, end_ms, result, detail, bytes, cpu_ms, peak_memory_bytes, merged }
    }

    pub(super) fn end(&mut self, now_ms: u64, result: SpanResult) {
        self.end_ms = Some(now_ms.max(self.start_ms));
        self.result = Some(result);
    }

    /// Returns its duration, up to `now_ms` if it is under way.
    pub fn duration_ms(&self, now_ms: u64) -> u64 {
        self.end_ms.unwrap_or(now_ms).saturating_sub(self.start_ms)
    }
}

impl Timeline {
    /// Begins a span.
    pub fn begin(&mut self, subject: Subject, name: impl Into<String>, now_ms: u64) {
        self.spans.push(Span::begin(subject, name.into(), now_ms));
        self.limit();
    }

    /// Returns the latest span of this kind that is under way; with any name if `name` is `None`.
    pub fn open(&mut self, subject: Subject, name: Option<&str>) -> Option<&mut Span> {
        let matches = |span: &&mut Span| {
            span.subject == subject && span.end_ms.is_none() && name.is_none_or(|name| span.name == name)
        };
        self.spans.iter_mut().rev().find(matches)
    }

    /// Returns the latest span of this kind and name.
    pub fn latest(&mut self, subject: Subject, name: &str) -> Option<&mut Span> {
        self.spans.iter_mut().rev().find(|span| span.subject == subject && span.name == name)
    }

    /// Ends the latest span of this kind that is under way, if there is one.
    pub fn end(&mut self, subject: Subject, name: Option<&str>, now_ms: u64, result: SpanResult) {
        if let Some(span) = self.open(subject, name) {
            span.end(now_ms, result);
        }
    }

    /// Ends the latest span of this kind and name, also one that has ended before.
    pub fn extend(&mut self, subject: Subject, name: &str, now_ms: u64, result: SpanResult) -> Option<&mut Span> {
        let span = self.latest(subject, name)?;
        span.end(now_ms, result);
        Some(span)
    }

    /// Returns the wait in which the last agent ended, if nothing began after it.
    pub fn last_wait(&self) -> Option<&Span> {
        let counts = |span: &&Span| matches!(span.subject, Subject::Phase | Subject::Wait | Subject::Undo);
        let last = self.spans.iter().rev().find(counts)?;
        (last.subject == Subject::Wait && last.result != Some(SpanResult::Done)).then_some(last)
    }

    /// Returns the number of waits since the last phase began.
    pub fn waits(&self) -> u32 {
        let since = self.spans.iter().rev().take_while(|span| span.subject != Subject::Phase);
        since.filter(|span| span.subject == Subject::Wait).map(|span| span.merged.unwrap_or(1)).sum()
    }

    /// Begins again for another image. Switches and undos stay, as the history of the machine.
    pub fn restart(&mut self) {
        self.spans.retain(|span| matches!(span.subject, Subject::Mount | Subject::Undo));
        self.layers.clear();
    }

    /// Ends all spans, because the agent that began them has ended.
    pub fn interrupt(&mut self, now_ms: u64) {
        self.spans
            .iter_mut()
            .filter(|span| span.end_ms.is_none())
            .for_each(|span| span.end(now_ms, SpanResult::Interrupted));
    }

    /// Adds reads of layers.
    pub fn add_layers(&mut self, reads: Vec<LayerRead>) {
        let shortened = |read: LayerRead| LayerRead { digest: read.digest.chars().take(DIGEST).collect(), ..read };
        self.layers.extend(reads.into_iter().map(shortened));
        let excess = self.layers.len().saturating_sub(LAYERS);
        self.layers.drain(..excess);
        self.dropped += excess as u64;
    }

    /// Merges and drops entries of a pivot that waits or repeats for days.
    fn limit(&mut self) {
        let waits: Vec<usize> = (0..self.spans.len()).filter(|&at| self.spans[at].subject == Subject::Wait).collect();
        if waits.len() > WAITS {
            let second = self.spans.remove(waits[1]);
            let first = &mut self.spans[waits[0]];
            let count = |span: &Span| span.merged.unwrap_or(1);
            first.merged = Some(count(first) + count(&second));
            (first.end_ms, first.detail, first.name) = (second.end_ms, second.detail, second.name);
        }
        if self.spans.len() > SPANS + WAITS {
            let ended = self.spans.iter().position(|span| span.end_ms.is_some() && span.subject != Subject::Wait);
            if let Some(at) = ended {
                self.spans.remove(at);
                self.dropped += 1;
            }
        }
    }
}

#[cfg(test)]
#[path = "timeline_tests.rs"]
pub(super) mod tests;
