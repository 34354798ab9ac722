//! The timelines of both sides as an SVG document: their steps, and their memory, on one axis of time.

use std::fmt::Write;

use super::sample::Sample;

const LEFT: f64 = 90.0;
const WIDTH: f64 = 860.0;
const ROW: f64 = 22.0;
const CURVE: f64 = 120.0;
const COLOURS: [&str; 8] = ["#4c78c8", "#58a55c", "#e0a030", "#b0568f", "#3aa0a8", "#8a63d2", "#d97d3a", "#7a7f87"];

/// Draws all samples below each other.
pub fn draw(samples: &[&Sample]) -> String {
    let longest = samples.iter().map(|sample| sample.wall()).fold(0.1, f64::max);
    let most = samples.iter().flat_map(|sample| &sample.memory).map(|(_, bytes)| *bytes).fold(1.0, f64::max);
    let (across, up) = (WIDTH / longest, CURVE / most);
    let height: f64 = samples.iter().map(|sample| 70.0 + ROW * sample.steps.len() as f64 + CURVE).sum();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{height}\" viewBox=\"0 0 {0} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        LEFT + WIDTH + 60.0
    );
    let mut top = 20.0;
    for sample in samples {
        let (side, wall) = (sample.side.word(), sample.wall());
        // Writing to a String cannot fail.
        let _ = writeln!(out, "<text x=\"10\" y=\"{top}\" font-weight=\"bold\">{side}: {wall:.1} s</text>");
        for (number, (name, begin, end)) in sample.steps.iter().enumerate() {
            let (x, y) = (LEFT + begin * across, top + 8.0 + ROW * number as f64);
            let (width, colour) = (((end - begin) * across).max(1.0), COLOURS[number % COLOURS.len()]);
            let _ =
                writeln!(out, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"14\" fill=\"{colour}\"/>");
            // Beside the bar, on the side that has room, or on the bar.
            let (at, anchor) = match x {
                _ if x + width <= LEFT + WIDTH * 0.7 => (x + width + 5.0, "start"),
                _ if x > LEFT + 200.0 => (x - 5.0, "end"),
                _ => (x + 5.0, "start"),
            };
            let seconds = end - begin;
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{name} {seconds:.1} s</text>",
                y + 11.0
            );
        }
        top += 14.0 + ROW * sample.steps.len() as f64 + CURVE;
        let shown = sample.memory.iter().filter(|(time, _)| *time <= longest);
        let points: Vec<_> = shown
            .map(|(time, bytes)| format!("{:.1},{:.1}", LEFT + time * across, top - bytes.max(0.0) * up))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#d03b3b\" stroke-width=\"1.5\"/>",
            points.join(" ")
        );
        let _ =
            writeln!(out, "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{top}\" y2=\"{top}\" stroke=\"#495057\"/>", LEFT + WIDTH);
        let _ = writeln!(out, "<text x=\"10\" y=\"{:.1}\" fill=\"#d03b3b\">memory</text>", top - 8.0);
        let end = LEFT + wall * across;
        let _ = writeln!(
            out,
            "<line x1=\"{end:.1}\" x2=\"{end:.1}\" y1=\"{:.1}\" y2=\"{top}\" stroke=\"#d03b3b\" stroke-dasharray=\"3\"/>",
            top - CURVE
        );
        let _ =
            writeln!(out, "<text x=\"{end:.1}\" y=\"{:.1}\" text-anchor=\"end\">multi-user.target</text>", top + 14.0);
        top += 56.0;
    }
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\">memory beyond the start, at most {:.0} MiB</text></svg>",
        height - 4.0,
        most / f64::from(1 << 20)
    );
    out
}
