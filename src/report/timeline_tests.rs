#![allow(clippy::unwrap_used)]

use super::*;
use node_store::Work;
use proptest::prelude::*;

/// Returns a timeline with a pull of so many layers, four at a time, a wait and a switch.
pub(in crate::report) fn pivot(layers: usize) -> Timeline {
    let mut timeline = Timeline::default();
    let span = |subject, name: &str, start: u64, end: u64, timeline: &mut Timeline| {
        timeline.begin(subject, name, start);
        timeline.end(subject, Some(name), end, SpanResult::Done);
    };
    span(Subject::Phase, "resolve", 10_000, 11_200, &mut timeline);
    timeline.begin(Subject::Phase, "pull", 11_200);
    span(Subject::Wait, "network", 12_000, 42_000, &mut timeline);
    let begin = |index: usize| 42_000 + (index as u64 / 4) * 800;
    timeline.layers = (0..layers)
        .map(|index| {
            let (start_ms, bytes) = (begin(index) + index as u64 % 4 * 37, 1_000_000 * (index as u64 % 9 + 1));
            let part = |late, cpu| Work { start_ms, end_ms: start_ms + 500 + late, bytes, cpu_ms: Some(cpu) };
            LayerRead {
                index,
                digest: format!("sha256:{index:012x}"),
                size: bytes,
                fetch: Work { cpu_ms: None, ..part(0, 0) },
                decompress: Some(part(60, 300)),
                write: Some(part(90, 200)),
                result: Some(SpanResult::Done),
            }
        })
        .collect();
    let pulled = begin(layers) + 1_000;
    timeline.end(Subject::Phase, Some("pull"), pulled, SpanResult::Done);
    let pull = timeline.latest(Subject::Phase, "pull").unwrap();
    (pull.bytes, pull.cpu_ms, pull.peak_memory_bytes) = (Some(250_000_000), Some(9_000), Some(90 << 20));
    span(Subject::Phase, "stage", pulled, pulled + 3_000, &mut timeline);
    timeline.begin(Subject::Phase, "switch", pulled + 3_000);
    span(Subject::Hook, "50-drain", pulled + 3_000, pulled + 3_900, &mut timeline);
    span(Subject::Mount, "the mount of /usr", pulled + 3_900, pulled + 3_950, &mut timeline);
    span(Subject::Step, "the merge of /etc", pulled + 3_950, pulled + 4_100, &mut timeline);
    timeline.end(Subject::Phase, Some("switch"), pulled + 4_100, SpanResult::Done);
    timeline.begin(Subject::Phase, "refresh", pulled + 4_100);
    span(Subject::Job, "try-restart sshd.service", pulled + 4_200, pulled + 4_500, &mut timeline);
    timeline.begin(Subject::Job, "try-restart chronyd.service", pulled + 4_500);
    timeline.end(Subject::Job, None, pulled + 6_000, SpanResult::Failed);
    timeline.end(Subject::Phase, Some("refresh"), pulled + 6_000, SpanResult::Done);
    timeline
}

#[test]
fn a_span_that_is_under_way_ends_with_its_agent() {
    let mut timeline = Timeline::default();
    timeline.begin(Subject::Phase, "pull", 5);
    timeline.begin(Subject::Wait, "network", 7);
    timeline.end(Subject::Wait, None, 9, SpanResult::Done);
    timeline.interrupt(20);
    let ends: Vec<_> = timeline.spans.iter().map(|span| (span.end_ms, span.result)).collect();
    assert_eq!(ends, [(Some(20), Some(SpanResult::Interrupted)), (Some(9), Some(SpanResult::Done))]);
    assert_eq!(timeline.extend(Subject::Phase, "pull", 30, SpanResult::Done).unwrap().end_ms, Some(30));
}

proptest! {
    #[test]
    fn a_timeline_stays_small_and_counts_every_wait(waits in 0usize..300, others in 0usize..1500) {
        let mut timeline = Timeline::default();
        for at in 0..waits.max(others) as u64 {
            for (subject, count) in [(Subject::Wait, waits), (Subject::Job, others)] {
                if at < count as u64 {
                    timeline.begin(subject, "x", 10 * at);
                    timeline.end(subject, None, 10 * at + 5, SpanResult::Done);
                }
            }
        }
        prop_assert!(timeline.spans.len() <= SPANS + WAITS);
        let of = |subject| timeline.spans.iter().filter(move |span| span.subject == subject);
        let counted: u32 = of(Subject::Wait).map(|span| span.merged.unwrap_or(1)).sum();
        prop_assert_eq!(counted as usize, waits);
        prop_assert_eq!(of(Subject::Job).count() + timeline.dropped as usize, others);
        prop_assert!(timeline.spans.is_sorted_by_key(|span| span.start_ms));
    }
}
