//! Writing for a person. A reader that went away (`| head`) is no reason to panic, as `println!` does,
//! nor to stop what is under way: what cannot be written is dropped.

use std::fmt::Display;
use std::io::Write;

use crate::report;

/// A line on stdout.
pub(super) fn out(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A text on stdout as it is.
pub(super) fn raw(text: &[u8]) {
    let _ = std::io::stdout().write_all(text);
}

/// A message on stderr, under our name; each of its lines without control characters.
pub(super) fn error(message: &str) {
    for line in message.lines() {
        let _ = writeln!(std::io::stderr(), "node-image-pivot: {}", report::one_line(line));
    }
}
