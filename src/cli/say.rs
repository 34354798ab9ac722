//! Writing for a person. A reader that went away (`| head`) must not cause a panic, as `println!` does,
//! nor stop the work: output that cannot be written is dropped.

use std::fmt::Display;
use std::io::{IsTerminal, Write};

use crate::report;

/// A line on stdout.
pub(super) fn out(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A text on stdout as it is.
pub(super) fn raw(text: &[u8]) {
    let _ = std::io::stdout().write_all(text);
}

/// Progress on stdout, under our name.
pub(super) fn news(line: &str) {
    out(format_args!("{}{line}", prefix(&std::io::stdout())));
}

/// Returns our name, to be put before a line. The journal puts it there itself, also on the console.
fn prefix(stream: &impl IsTerminal) -> &'static str {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some() && !stream.is_terminal();
    if journal { "" } else { "node-image-pivot: " }
}

/// A message on stderr, under our name; each of its lines without control characters.
pub(super) fn error(message: &str) {
    let prefix = prefix(&std::io::stderr());
    for line in message.lines() {
        let _ = writeln!(std::io::stderr(), "{prefix}{}", report::one_line(line));
    }
}
