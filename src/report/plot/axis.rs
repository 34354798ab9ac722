//! The time axis. Long times in which nothing happened are cut, so that the rest stays legible.

/// Width of a cut, which has its length as a text.
pub(super) const CUT: f64 = 84.0;
/// Largest number of cuts; the longest gaps are cut.
const CUTS: usize = 4;
/// Shortest gap that is cut, in milliseconds.
const SHORTEST: u64 = 5_000;
/// A gap is cut if it is longer than this share of the busy time.
const SHARE: f64 = 0.15;
/// Smallest distance of two ticks.
const STEP: f64 = 72.0;
/// Distances of ticks, in milliseconds.
const STEPS: [u64; 22] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 60_000, 120_000, 300_000, 600_000,
    1_800_000, 3_600_000, 14_400_000,
];

/// A part of the axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Segment {
    pub(super) start_ms: u64,
    pub(super) end_ms: u64,
    pub(super) x: f64,
    pub(super) width: f64,
    pub(super) is_cut: bool,
}

/// A map from times to places. Total: times outside the axis get the nearest end.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    pub(super) segments: Vec<Segment>,
}

impl Axis {
    /// Returns an axis from `x` on, `width` wide, for the whole time from `start_ms` to `end_ms`. `busy` are the intervals
    /// in which something happened.
    pub(super) fn new(start_ms: u64, end_ms: u64, busy: &[(u64, u64)], x: f64, width: f64) -> Self {
        let end_ms = end_ms.max(start_ms + 1);
        let mut gaps = gaps(start_ms, end_ms, busy);
        let busy_ms = (end_ms - start_ms) - gaps.iter().map(|(start, end)| end - start).sum::<u64>();
        gaps.retain(|(start, end)| end - start >= SHORTEST && (end - start) as f64 > SHARE * busy_ms as f64);
        gaps.sort_by_key(|(start, end)| std::cmp::Reverse(end - start));
        gaps.truncate(CUTS);
        gaps.sort_unstable();
        let cut_ms: u64 = gaps.iter().map(|(start, end)| end - start).sum();
        let scale = (width - CUT * gaps.len() as f64) / (end_ms - start_ms - cut_ms).max(1) as f64;
        let (mut segments, mut at, mut place) = (Vec::new(), start_ms, x);
        let mut add = |start_ms, end_ms, width, is_cut| {
            if end_ms > start_ms {
                segments.push(Segment { start_ms, end_ms, x: place, width, is_cut });
                place += width;
            }
        };
        for (start, end) in gaps {
            add(at, start, (start - at) as f64 * scale, false);
            add(start, end, CUT, true);
            at = end;
        }
        add(at, end_ms, (end_ms - at) as f64 * scale, false);
        Self { segments }
    }

    /// Returns the place of a time.
    pub(super) fn x(&self, ms: u64) -> f64 {
        let last = self.segments.last().map_or(0.0, |last| last.x + last.width);
        let Some(segment) = self.segments.iter().find(|segment| ms < segment.end_ms) else { return last };
        let share = ms.saturating_sub(segment.start_ms) as f64 / (segment.end_ms - segment.start_ms) as f64;
        segment.x + share * segment.width
    }

    /// Returns the ticks: the milliseconds since the begin of the axis, and the place.
    pub(super) fn ticks(&self) -> Vec<(u64, f64)> {
        let Some(begin) = self.segments.first().map(|first| first.start_ms) else { return Vec::new() };
        let mut ticks: Vec<(u64, f64)> = Vec::new();
        for segment in self.segments.iter().filter(|segment| !segment.is_cut) {
            let (start, end) = (segment.start_ms - begin, segment.end_ms - begin);
            let per_ms = segment.width / (end - start) as f64;
            let Some(step) = STEPS.into_iter().find(|step| *step as f64 * per_ms >= STEP) else { continue };
            for ms in (start.next_multiple_of(step)..=end).step_by(step as usize) {
                let x = segment.x + (ms - start) as f64 * per_ms;
                if ticks.last().is_none_or(|(_, last)| x - last >= STEP) {
                    ticks.push((ms, x));
                }
            }
        }
        ticks
    }
}

/// Returns the intervals between `start_ms` and `end_ms` in which nothing was busy, in order.
fn gaps(start_ms: u64, end_ms: u64, busy: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut busy = busy.to_vec();
    busy.sort_unstable();
    let (mut gaps, mut at) = (Vec::new(), start_ms);
    for (start, end) in busy.into_iter().chain([(end_ms, end_ms)]) {
        let start = start.min(end_ms);
        if start > at {
            gaps.push((at, start));
        }
        at = at.max(end);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_long_wait_is_cut_and_a_short_one_is_not() {
        let axis = |end| Axis::new(0, end, &[(0, 10_000), (end - 10_000, end)], 100.0, 900.0);
        let cut = |axis: &Axis| axis.segments.iter().map(|segment| segment.is_cut).collect::<Vec<_>>();
        assert_eq!(cut(&axis(22_000)), [false]);
        let day = axis(86_400_000);
        assert_eq!(cut(&day), [false, true, false]);
        assert_eq!((day.segments[0].width.round(), day.segments[1].width), ((900.0 - CUT) / 2.0, CUT));
        assert_eq!(gaps(5, 30, &[(20, 25), (6, 8), (7, 10), (40, 50)]), [(5, 6), (10, 20), (25, 30)]);
    }

    proptest! {
        #[test]
        fn later_times_are_further_right(
            start in 0u64..1_000_000,
            length in 0u64..200_000_000,
            busy in prop::collection::vec((0u64..200_000_000, 0u64..100_000), 0..20),
            times in prop::collection::vec(0u64..300_000_000, 2..20),
        ) {
            let busy: Vec<_> = busy.into_iter().map(|(begin, length)| (begin, begin + length)).collect();
            let axis = Axis::new(start, start + length, &busy, 200.0, 900.0);
            let mut times = times;
            times.sort_unstable();
            let places: Vec<f64> = times.iter().map(|ms| axis.x(*ms)).collect();
            prop_assert!(places.is_sorted(), "{places:?}");
            prop_assert!(places.iter().all(|x| (199.9..=1100.1).contains(x)), "{places:?}");
            let ticks = axis.ticks();
            prop_assert!(ticks.windows(2).all(|pair| pair[1].1 - pair[0].1 >= STEP - 0.01), "{ticks:?}");
        }
    }
}
