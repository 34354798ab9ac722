//! A logger that never fails: one line to the kernel's ring buffer, or to standard error.
//!
//! Neither the journal nor syslog runs yet when a generator does. The kernel's buffer is read by
//! the journal as soon as it is up.

use std::fs::OpenOptions;
use std::io::Write;

/// Severities of syslog(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Level {
    Warning = 4,
    Notice = 5,
    Info = 6,
    Debug = 7,
}

/// The destination of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    /// `/dev/kmsg`, and standard error when that cannot be written.
    Kernel,
    /// Standard error: for tests.
    Stderr,
}

impl Sink {
    /// Writes one line. Whatever goes wrong is ignored: a boot must not fail for want of a log.
    pub fn log(self, level: Level, message: &str) {
        // One line, since a newline would end the record and lose the rest of its prefix.
        let line = format!("<{}>node-image-pivot-generator: {}\n", level as u8, message.replace('\n', " "));
        // Each record has to be a single write of at most about 1 KiB.
        let mut end = line.len().min(900);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        let kernel = || OpenOptions::new().write(true).open("/dev/kmsg")?.write_all(&line.as_bytes()[..end]);
        if self == Sink::Stderr || kernel().is_err() {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}
