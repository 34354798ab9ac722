//! The picture: bars per case, and curves of growth.

use std::fmt::Write;

use crate::summary::{Measure, Runs};

const INCUMBENT: &str = "#9aa5b1";
const OURS: &str = "#0b7285";
/// Size of one panel's plot area and the space around it.
const PLOT: (f64, f64) = (420.0, 180.0);
const MARGIN: (f64, f64) = (70.0, 60.0);
const SHOWN: [(Measure, &str); 4] = [
    (Measure::Wall, "wall time, s"),
    (Measure::Cpu, "CPU time, s"),
    (Measure::TmpfsPeak, "tmpfs peak, MiB"),
    (Measure::TmpfsResident, "tmpfs resident (live ISO), MiB"),
];

/// The whole picture: one row per measure, cases at the left, growth at the right.
pub fn svg(runs: &[&Runs]) -> String {
    let (cases, growth): (Vec<&Runs>, Vec<&Runs>) = runs.iter().partition(|run| run.case.growth.is_none());
    let (width, height) = (2.0 * (PLOT.0 + MARGIN.0) + 30.0, SHOWN.len() as f64 * (PLOT.1 + MARGIN.1) + 60.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (x, colour, name) in [(MARGIN.0, INCUMBENT, "incumbent"), (MARGIN.0 + 110.0, OURS, "node-image-pivot")] {
        rectangle(&mut out, (x, 12.0, 12.0, 12.0), colour);
        text(&mut out, (x + 18.0, 22.0), "start", name);
    }
    for (at, (measure, title)) in SHOWN.into_iter().enumerate() {
        let top = 60.0 + at as f64 * (PLOT.1 + MARGIN.1);
        bars(&mut out, (MARGIN.0, top), measure, title, &cases);
        curve(&mut out, (2.0 * MARGIN.0 + PLOT.0, top), measure, title, &growth);
    }
    out.push_str("</svg>\n");
    out
}

fn bars(out: &mut String, at: (f64, f64), measure: Measure, title: &str, runs: &[&Runs]) {
    let scale = axis(out, at, measure, &format!("{title}, per case"), runs);
    let slot = PLOT.0 / runs.len().max(1) as f64;
    for (number, run) in runs.iter().enumerate() {
        let left = at.0 + slot * number as f64;
        let row = run.row(measure);
        let bar = slot * 0.3;
        for (value, offset, colour) in [(row.incumbent, 0.18, INCUMBENT), (row.ours, 0.52, OURS)] {
            let (x, height) = (left + slot * offset, value * scale);
            rectangle(out, (x, at.1 + PLOT.1 - height, bar, height), colour);
            let shown = measure.shown(value);
            text(out, (x + bar / 2.0, at.1 + PLOT.1 - height - 4.0), "middle", &shown);
        }
        text(out, (left + slot / 2.0, at.1 + PLOT.1 + 16.0), "middle", &run.case.name);
    }
}

fn curve(out: &mut String, at: (f64, f64), measure: Measure, title: &str, runs: &[&Runs]) {
    let scale = axis(out, at, measure, &format!("{title}, by changed content"), runs);
    let place = |run: &Runs| at.0 + 10.0 + f64::from(run.case.growth.unwrap_or(0)) / 100.0 * (PLOT.0 - 30.0);
    for run in runs {
        let percent = format!("{} %", run.case.growth.unwrap_or(0));
        // 1 % and 10 % are close to each other: the first one's label goes to the left.
        let shift = if run.case.growth == Some(1) { -8.0 } else { 0.0 };
        text(out, (place(run) + shift, at.1 + PLOT.1 + 16.0), "middle", &percent);
    }
    for (ours, colour) in [(false, INCUMBENT), (true, OURS)] {
        let points = runs.iter().map(|run| {
            let row = run.row(measure);
            let value = if ours { row.ours } else { row.incumbent };
            (place(run), at.1 + PLOT.1 - value * scale, value)
        });
        let points: Vec<(f64, f64, f64)> = points.collect();
        let path: Vec<String> = points.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (x, y, value) in points {
            let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
            text(out, (x + 4.0, y - 6.0), "start", &measure.shown(value));
        }
    }
}

/// Title and base line; the height of one unit.
fn axis(out: &mut String, at: (f64, f64), measure: Measure, title: &str, runs: &[&Runs]) -> f64 {
    let values = runs.iter().map(|run| run.row(measure)).flat_map(|row| [row.ours, row.incumbent]);
    let most = values.fold(0.0, f64::max);
    text(out, (at.0, at.1 - 20.0), "start", title);
    let bottom = at.1 + PLOT.1;
    let _ = writeln!(
        out,
        "<line x1=\"{}\" y1=\"{bottom}\" x2=\"{}\" y2=\"{bottom}\" stroke=\"#495057\"/>",
        at.0,
        at.0 + PLOT.0
    );
    if most > 0.0 { (PLOT.1 - 10.0) / most } else { 0.0 }
}

fn rectangle(out: &mut String, (x, y, width, height): (f64, f64, f64, f64), colour: &str) {
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

/// `words` are ours and need no escaping.
fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}
