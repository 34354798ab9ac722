//! Shapes, and their form as SVG.

use std::fmt::Write;

/// Width of a letter. The fonts have a fixed width of about 0.6 em.
pub(super) const LETTER: f64 = 6.8;
/// The side of a text that is at its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A shape. `class` selects its colour.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shape {
    /// A bar; the viewer shows `title` when the pointer is on it.
    Bar { class: &'static str, x: f64, y: f64, width: f64, height: f64, title: String },
    /// A vertical line.
    Line { class: &'static str, x: f64, top: f64, bottom: f64 },
    /// A text; `y` is its base line.
    Text { class: &'static str, x: f64, y: f64, anchor: Anchor, text: String },
}

/// A picture.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Picture {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) shapes: Vec<Shape>,
}

impl Picture {
    /// Adds a text of printable ASCII letters, whose width is known in every font.
    pub(super) fn text(&mut self, class: &'static str, x: f64, y: f64, anchor: Anchor, text: &str) {
        self.shapes.push(Shape::Text { class, x, y, anchor, text: printable(text) });
    }
}

/// Shortens a text to so many letters.
pub(super) fn fit(text: &str, letters: usize) -> String {
    let text = printable(text);
    if text.len() <= letters { text } else { format!("{}..", &text[..letters.saturating_sub(2)]) }
}

fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter == ' ' || letter.is_ascii_graphic() { letter } else { '?' }).collect()
}

fn escaped(text: &str) -> String {
    let text = printable(text);
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The colours, in light and dark.
const STYLE: &str = "
svg { --back: #ffffff; --text: #1c1f23; --soft: #5b6470; --grid: #e3e6ea; --phase: #4c78c8; --fetch: #58a55c;
  --decompress: #e0a030; --write: #b0568f; --wait: #c9cdd3; --step: #3aa0a8; --hook: #8a63d2; --job: #d97d3a;
  --undo: #7a7f87; --bad: #d03b3b }
@media (prefers-color-scheme: dark) { svg { --back: #16181c; --text: #e6e8eb; --soft: #a0a8b3; --grid: #2c3138;
  --phase: #6b97e6; --fetch: #6cc070; --decompress: #e8b552; --write: #cf78b0; --wait: #4a515b; --step: #55bcc4;
  --hook: #a98bea; --job: #ee9a5a; --undo: #9aa0a8; --bad: #f06a6a } }
text { font: 11px ui-monospace, 'DejaVu Sans Mono', 'Liberation Mono', monospace; fill: var(--text);
  paint-order: stroke; stroke: var(--back); stroke-width: 3px; stroke-linejoin: round }
.back { fill: var(--back) } .soft { fill: var(--soft) } .title { font-weight: bold } .badtext { fill: var(--bad) }
.grid { stroke: var(--grid) } .switch { stroke: var(--bad); stroke-width: 1.5 } .cut { fill: var(--grid) }
.phase { fill: var(--phase) } .fetch { fill: var(--fetch) } .decompress { fill: var(--decompress) }
.write { fill: var(--write) } .wait { fill: var(--wait) } .step { fill: var(--step) } .hook { fill: var(--hook) }
.job { fill: var(--job) } .undo { fill: var(--undo) } .bad { fill: var(--bad) }
";

/// Returns the picture as an SVG document.
pub(super) fn render(picture: &Picture) -> String {
    let Picture { width, height, shapes } = picture;
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" \
         height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\">\n<style>{STYLE}</style>\n\
         <rect class=\"back\" width=\"{width:.0}\" height=\"{height:.0}\"/>\n"
    );
    for shape in shapes {
        // Writing to a String cannot fail.
        let _ = match shape {
            Shape::Bar { class, x, y, width, height, title } => writeln!(
                out,
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"><title>{}\
                 </title></rect>",
                escaped(title)
            ),
            Shape::Line { class, x, top, bottom } => {
                writeln!(
                    out,
                    "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>"
                )
            }
            Shape::Text { class, x, y, anchor, text } => {
                let anchor = match anchor {
                    Anchor::Start => "start",
                    Anchor::Middle => "middle",
                    Anchor::End => "end",
                };
                let text = escaped(text);
                writeln!(
                    out,
                    "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
                )
            }
        };
    }
    out.push_str("</svg>\n");
    out
}
