//! A logger that never fails. It writes lines to the kernel's ring buffer, or to standard error.
//!
//! Neither the journal nor syslog runs yet when a generator runs. The journal reads the kernel's buffer when it starts.

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
    /// `/dev/kmsg`, or standard error if `/dev/kmsg` cannot be written.
    Kernel,
    /// Standard error, for tests.
    Stderr,
}

impl Sink {
    /// Writes one line. Errors are ignored: a boot must not fail because a message cannot be logged.
    pub fn log(self, level: Level, message: &str) {
        // A newline would end the record, and the next line would lack the prefix.
        let line = format!("<{}>node-image-pivot-generator: {}\n", level as u8, message.replace('\n', " "));
        // The kernel accepts a record only as a single write of about 1 KiB at most.
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
