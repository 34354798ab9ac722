//! Writes to stdout and stderr. Output that cannot be written is dropped: a closed pipe (`| head`) must not cause a panic,
//! as `println!` does, nor end the call.

use std::fmt::Display;
use std::io::{IsTerminal, Write};

use crate::report;

/// Writes a line to stdout.
pub(super) fn out(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Writes a text to stdout without changes.
pub(super) fn raw(text: &[u8]) {
    let _ = std::io::stdout().write_all(text);
}

/// Writes a line about progress to stdout, after the program's name.
pub(super) fn progress(line: &str) {
    out(format_args!("{}{line}", prefix(&std::io::stdout())));
}

/// Returns true if stdout goes to the journal.
pub(super) fn is_journal() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some() && !std::io::stdout().is_terminal()
}

/// Returns the program's name as a prefix, or an empty text for the journal, which adds the name itself.
fn prefix(stream: &impl IsTerminal) -> &'static str {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some() && !stream.is_terminal();
    if journal { "" } else { "node-image-pivot: " }
}

/// Writes the lines of a message to stderr, after the program's name and without control characters.
pub(super) fn error(message: &str) {
    let prefix = prefix(&std::io::stderr());
    for line in message.lines() {
        let _ = writeln!(std::io::stderr(), "{prefix}{}", report::one_line(line));
    }
}
