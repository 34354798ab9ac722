//! The places of all shapes. Pure.

use super::axis::Axis;
use super::svg::{Anchor, LETTER, Picture, Shape, fit};
use crate::report::timeline::Span;
use crate::report::words::{human_ms, timestamp};
use crate::report::{Report, SpanResult, Subject, state_line};
use node_store::{LayerRead, Work};
use support::human_bytes;

/// Height of a row.
const ROW: f64 = 17.0;
/// Letters of a row's name, left of the bars.
const NAME: usize = 40;
/// Left end of the bars, their width, and the room for the text that follows a bar.
const LEFT: f64 = 16.0 + NAME as f64 * LETTER + 8.0;
const WIDTH: f64 = 900.0;
const RIGHT: f64 = 22.0 * LETTER;
/// Letters of a line of the head.
const LINE: usize = 166;
/// Largest number of layers of which each has a row.
const LAYER_ROWS: usize = 24;
/// Lanes of the picture with more layers, and rows for the slowest of these.
const LANES: usize = 12;
const SLOWEST: usize = 6;
/// Most rows of another group. The shortest spans share the last one.
const ROWS: usize = 32;

/// Groups of rows, in their order.
const GROUPS: [(&str, &[Subject]); 5] = [
    ("Phases", &[Subject::Phase]),
    ("Waits and retries", &[Subject::Wait]),
    ("Switch", &[Subject::Hook, Subject::Step, Subject::Mount]),
    ("Units", &[Subject::Job]),
    ("Undo", &[Subject::Undo, Subject::UndoStep]),
];

/// Returns the picture of a report.
pub(super) fn layout(report: &Report) -> Picture {
    let mut picture = Picture { width: LEFT + WIDTH + RIGHT, ..Picture::default() };
    let (times, end_ms) = (busy(report), end(report));
    let start_ms = start(report).min(end_ms);
    let mut draw =
        Draw { axis: Axis::new(start_ms, end_ms, &times, LEFT, WIDTH), end_ms, y: 0.0, picture: &mut picture };
    draw.head(report, start_ms);
    let top = draw.y;
    draw.y += 2.0 * ROW;
    let timeline = &report.timeline;
    for (at, (name, subjects)) in GROUPS.iter().enumerate() {
        let spans: Vec<&Span> = timeline.spans.iter().filter(|span| subjects.contains(&span.subject)).collect();
        draw.group(name, &spans);
        if at == 1 {
            draw.layers(&timeline.layers);
        }
    }
    draw.marks(report, top);
    draw.legend();
    picture.height = bottom(&picture) + ROW;
    picture
}

fn bottom(picture: &Picture) -> f64 {
    let of = |shape: &Shape| match shape {
        Shape::Bar { y, height, .. } => y + height,
        Shape::Line { bottom, .. } => *bottom,
        Shape::Text { y, .. } => *y,
    };
    picture.shapes.iter().map(of).fold(0.0, f64::max)
}

/// Returns the intervals in which something happened. A phase is busy unless it waits.
fn busy(report: &Report) -> Vec<(u64, u64)> {
    let spans = &report.timeline.spans;
    let interval = |span: &Span| (span.start_ms, span.end_ms.unwrap_or(report.now_ms));
    let waits: Vec<_> = spans.iter().filter(|span| span.subject == Subject::Wait).map(interval).collect();
    let mut times = Vec::new();
    for span in spans.iter().filter(|span| span.subject != Subject::Wait) {
        let (mut at, end) = interval(span);
        let within = waits.iter().filter(|(start, _)| span.subject == Subject::Phase && (at..end).contains(start));
        for (start, until) in within.copied().collect::<Vec<_>>() {
            times.push((at, start.max(at)));
            at = until;
        }
        times.push((at, end.max(at)));
    }
    times.extend(report.timeline.layers.iter().map(|layer| (layer.fetch.start_ms, layer.end_ms())));
    times
}

fn start(report: &Report) -> u64 {
    let layers = report.timeline.layers.iter().map(|layer| layer.fetch.start_ms);
    report.timeline.spans.iter().map(|span| span.start_ms).chain(layers).min().unwrap_or(report.now_ms)
}

fn end(report: &Report) -> u64 {
    let layers = report.timeline.layers.iter().map(LayerRead::end_ms);
    let spans = report.timeline.spans.iter().map(|span| span.end_ms.unwrap_or(report.now_ms));
    spans.chain(layers).max().unwrap_or(report.now_ms)
}

struct Draw<'a> {
    axis: Axis,
    end_ms: u64,
    /// Base line of the last row.
    y: f64,
    picture: &'a mut Picture,
}

impl Draw<'_> {
    fn line(&mut self, class: &'static str, text: &str) {
        self.y += ROW;
        self.picture.text(class, 16.0, self.y, Anchor::Start, &fit(text, LINE));
    }

    fn head(&mut self, report: &Report, start_ms: u64) {
        let status = &report.status;
        self.line("title", &format!("node-image-pivot {}", report.version));
        let begin = timestamp(report.boot_unix_ms + start_ms);
        self.line("soft", &format!("{begin}, {} after the boot of the kernel", human_ms(start_ms)));
        if let Some(image) = status.digest.as_ref().or(status.image.as_ref()) {
            self.line("soft", image);
        }
        let class = if status.error.is_some() { "badtext" } else { "soft" };
        let state = state_line(status, report.now_unix());
        self.line(class, &state);
        if state.len() > LINE {
            self.line(class, state.get(LINE - 2..).unwrap_or_default());
        }
        self.y += ROW / 2.0;
    }

    fn heading(&mut self, text: &str) {
        self.y += ROW * 1.4;
        self.picture.text("title", 16.0, self.y, Anchor::Start, text);
    }

    /// Begins a row with its name.
    fn row(&mut self, name: &str) {
        self.y += ROW;
        self.picture.text("", LEFT - 8.0, self.y, Anchor::End, &fit(name, NAME));
    }

    /// Draws a bar in the row, between these shares of its height.
    fn bar(&mut self, class: &'static str, (start_ms, end_ms): (u64, u64), (top, bottom): (f64, f64), title: String) {
        let x = self.axis.x(start_ms);
        let width = (self.axis.x(end_ms) - x).max(1.0);
        let (y, height) = (self.y - ROW + 5.0 + top * (ROW - 4.0), (bottom - top) * (ROW - 4.0));
        self.picture.shapes.push(Shape::Bar { class, x, y, width, height, title });
    }

    /// Writes a text after a bar that ends at this time.
    fn after(&mut self, end_ms: u64, text: &str) {
        let x = self.axis.x(end_ms) + 5.0;
        self.picture.text("soft", x, self.y, Anchor::Start, &fit(text, (RIGHT / LETTER) as usize - 2));
    }

    fn group(&mut self, name: &str, spans: &[&Span]) {
        if spans.is_empty() {
            return;
        }
        self.heading(name);
        let mut by_length: Vec<usize> = (0..spans.len()).collect();
        by_length.sort_by_key(|at| std::cmp::Reverse(spans[*at].duration_ms(self.end_ms)));
        let (own, shared) = by_length.split_at(if spans.len() > ROWS { ROWS - 1 } else { spans.len() });
        for (_, span) in spans.iter().enumerate().filter(|(at, _)| own.contains(at)) {
            self.row(&span.name);
            self.span(span);
            let mut text = human_ms(span.duration_ms(self.end_ms));
            match (span.result, span.merged) {
                (Some(SpanResult::Failed), _) => text.push_str(", failed"),
                (Some(SpanResult::Interrupted), _) => text.push_str(", interrupted"),
                (None, _) => text.push_str(", running"),
                (_, Some(merged)) => text.push_str(&format!(", {merged} waits")),
                _ => {}
            }
            self.after(span.end_ms.unwrap_or(self.end_ms), &text);
        }
        if !shared.is_empty() {
            self.row(&format!("{} shorter ones", shared.len()));
            let sum = shared.iter().map(|at| spans[*at].duration_ms(self.end_ms)).sum();
            let mut last = 0;
            for span in shared.iter().map(|at| spans[*at]) {
                self.span(span);
                last = last.max(span.end_ms.unwrap_or(self.end_ms));
            }
            self.after(last, &format!("{} in total", human_ms(sum)));
        }
    }

    fn span(&mut self, span: &Span) {
        let class = match (span.result, span.subject) {
            (Some(SpanResult::Failed), _) => "bad",
            (_, Subject::Phase) => "phase",
            (_, Subject::Wait) => "wait",
            (_, Subject::Step | Subject::Mount | Subject::Other) => "step",
            (_, Subject::Hook) => "hook",
            (_, Subject::Job) => "job",
            (_, Subject::Undo | Subject::UndoStep) => "undo",
        };
        let (end, length) = (span.end_ms.unwrap_or(self.end_ms), human_ms(span.duration_ms(self.end_ms)));
        let title = [Some(format!("{}: {length}", span.name)), span.detail.clone()].into_iter().flatten();
        self.bar(class, (span.start_ms, end), (0.0, 1.0), title.collect::<Vec<_>>().join("; "));
    }

    /// Draws each layer in a row, or in lanes if there are too many.
    fn layers(&mut self, layers: &[LayerRead]) {
        if layers.is_empty() {
            return;
        }
        let bytes = layers.iter().map(|layer| layer.fetch.bytes).sum();
        self.heading(&format!("Layers: {} reads, {} fetched", layers.len(), human_bytes(bytes)));
        if layers.len() <= LAYER_ROWS {
            return layers.iter().for_each(|layer| self.layer_row(layer));
        }
        for (number, lane) in lanes(layers).iter().enumerate() {
            self.row(&format!("lane {}: {} reads", number + 1, lane.len()));
            lane.iter().for_each(|layer| self.layer(layer));
        }
        let mut slowest: Vec<&LayerRead> = layers.iter().collect();
        slowest.sort_by_key(|layer| std::cmp::Reverse(layer.duration_ms()));
        self.heading("Slowest layers");
        slowest.into_iter().take(SLOWEST).for_each(|layer| self.layer_row(layer));
    }

    fn layer_row(&mut self, layer: &LayerRead) {
        self.row(&format!(
            "{} {} {}",
            layer.index,
            layer.digest.trim_start_matches("sha256:"),
            human_bytes(layer.size)
        ));
        self.layer(layer);
        let end = match layer.result {
            Some(SpanResult::Failed) => ", failed",
            Some(SpanResult::Interrupted) => ", interrupted",
            Some(SpanResult::NotNeeded) => ", not needed",
            Some(SpanResult::Done | SpanResult::Other) => "",
            None => ", running",
        };
        self.after(layer.end_ms(), &format!("{}{end}", human_ms(layer.duration_ms())));
    }

    fn layer(&mut self, layer: &LayerRead) {
        let fetch = if layer.result == Some(SpanResult::Failed) { "bad" } else { "fetch" };
        let parts = [
            (fetch, "fetch", Some(layer.fetch)),
            ("decompress", "decompress", layer.decompress),
            ("write", "write", layer.write),
        ];
        for (at, (class, name, part)) in parts.into_iter().enumerate() {
            let Some(Work { start_ms, end_ms, bytes, cpu_ms }) = part else { continue };
            let cpu = cpu_ms.map(|ms| format!(", {} CPU", human_ms(ms))).unwrap_or_default();
            let took = human_ms(end_ms.saturating_sub(start_ms));
            let title = format!("layer {}: {name} {} in {took}{cpu}", layer.index, human_bytes(bytes));
            let top = at as f64 / 3.0;
            self.bar(class, (start_ms, end_ms), (top, top + 0.3), title);
        }
    }

    /// Draws the axis at `top`, the cuts, and the moments of switches and undos, all behind the bars.
    fn marks(&mut self, report: &Report, top: f64) {
        let (bars, bottom) = (std::mem::take(&mut self.picture.shapes), self.y + 6.0);
        let (axis, text) = (self.axis.clone(), top + 2.0 * ROW);
        for cut in axis.segments.iter().filter(|segment| segment.is_cut) {
            let title = "nothing happened, or the agent waited".to_owned();
            let (y, height) = (text - ROW + 4.0, bottom - text + ROW - 4.0);
            self.picture.shapes.push(Shape::Bar { class: "cut", x: cut.x, y, width: cut.width, height, title });
            let length = clock(cut.end_ms - cut.start_ms);
            self.picture.text(
                "soft",
                cut.x + cut.width / 2.0,
                text,
                Anchor::Middle,
                &fit(&format!("~ {length} ~"), 12),
            );
        }
        let mut free = f64::MIN;
        let cuts: Vec<_> = axis.segments.iter().filter(|segment| segment.is_cut).collect();
        for (ms, x) in axis.ticks() {
            self.picture.shapes.push(Shape::Line { class: "grid", x, top: text + 4.0, bottom });
            let label = clock(ms);
            let half = label.len() as f64 * LETTER / 2.0 + 2.0;
            let is_free = x - half > free && cuts.iter().all(|cut| x + half < cut.x || x - half > cut.x + cut.width);
            if is_free {
                self.picture.text("soft", x, text, Anchor::Middle, &label);
                free = x + half;
            }
        }
        let moments = report.timeline.spans.iter().filter_map(|span| match span.subject {
            Subject::Mount => Some((span.end_ms?, "switch")),
            Subject::Undo => Some((span.start_ms, "undo")),
            _ => None,
        });
        let mut moments: Vec<_> = moments.collect();
        moments.sort_unstable();
        let mut free = f64::MIN;
        for (ms, name) in moments {
            let x = axis.x(ms);
            self.picture.shapes.push(Shape::Line { class: "switch", x, top: top + ROW + 4.0, bottom });
            let half = name.len() as f64 * LETTER / 2.0 + 2.0;
            if x - half > free {
                self.picture.text("badtext", x, top + ROW, Anchor::Middle, name);
                free = x + half;
            }
        }
        self.picture.shapes.extend(bars);
    }

    fn legend(&mut self) {
        self.y += ROW * 2.0;
        let mut x = 16.0;
        for class in ["phase", "wait", "fetch", "decompress", "write", "hook", "step", "job", "undo", "bad"] {
            let (y, title) = (self.y - 9.0, String::new());
            self.picture.shapes.push(Shape::Bar { class, x, y, width: 10.0, height: 10.0, title });
            let name = if class == "bad" { "failed" } else { class };
            self.picture.text("soft", x + 14.0, self.y, Anchor::Start, name);
            x += 14.0 + (name.len() + 3) as f64 * LETTER;
        }
    }
}

/// Distributes the layers to as few lanes as possible, so that no two of a lane overlap. The last lane has the rest.
fn lanes(layers: &[LayerRead]) -> Vec<Vec<&LayerRead>> {
    let mut sorted: Vec<&LayerRead> = layers.iter().collect();
    sorted.sort_by_key(|layer| layer.fetch.start_ms);
    let mut lanes: Vec<(u64, Vec<&LayerRead>)> = Vec::new();
    for layer in sorted {
        let free = lanes.iter().position(|(end, _)| *end <= layer.fetch.start_ms);
        let at = free.unwrap_or_else(|| {
            if lanes.len() < LANES {
                lanes.push((0, Vec::new()));
            }
            lanes.len() - 1
        });
        lanes[at].0 = lanes[at].0.max(layer.end_ms());
        lanes[at].1.push(layer);
    }
    lanes.into_iter().map(|(_, lane)| lane).collect()
}

/// Formats a time on the axis: `0.25 s`, `4 s`, `1:05`, `2:03:00`.
fn clock(ms: u64) -> String {
    let (seconds, rest) = (ms / 1_000, ms % 1_000);
    match seconds {
        0..60 if rest == 0 => format!("{seconds} s"),
        0..60 => format!("{} s", ms as f64 / 1_000.0),
        60..3_600 => format!("{}:{:02}", seconds / 60, seconds % 60),
        _ => format!("{}:{:02}:{:02}", seconds / 3_600, seconds / 60 % 60, seconds % 60),
    }
}
