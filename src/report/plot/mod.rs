//! The picture of a report, in the manner of `systemd-analyze plot`. A total function of the report.

mod axis;
mod layout;
mod svg;
#[cfg(test)]
mod tests;

use super::Report;

/// Returns the picture as an SVG document.
pub fn plot(report: &Report) -> String {
    svg::render(&layout::layout(report))
}
