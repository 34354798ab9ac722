//! A serial console on a socket, read by a thread: what was printed, waiting for words, typing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::proc::wait_for;

#[derive(Default)]
struct Seen {
    text: String,
    closed: bool,
}

/// The console of one guest.
pub struct Console {
    shared: Arc<(Mutex<Seen>, Condvar)>,
    writer: UnixStream,
}

/// Escape sequences for colour and cursor would tear words apart.
fn plain(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut chars = raw.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' if chars.peek() == Some(&'[') => {
                chars.next();
                for c in chars.by_ref() {
                    if ('@'..='~').contains(&c) {
                        break;
                    }
                }
            }
            '\r' => {}
            c => out.push(c),
        }
    }
    out
}

impl Console {
    /// Connect to the emulator's socket (it appears a moment after the emulator's start).
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut stream = None;
        wait_for("the console's socket", Duration::from_secs(180), || {
            stream = UnixStream::connect(socket).ok();
            Ok(stream.is_some())
        })?;
        let Some(writer) = stream else { bail!("no console") };
        let mut reader = writer.try_clone()?;
        let shared = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
        let for_thread = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            loop {
                let read = reader.read(&mut buffer).unwrap_or(0);
                let mut seen = lock(&for_thread.0);
                if read == 0 {
                    seen.closed = true;
                } else {
                    seen.text.push_str(&String::from_utf8_lossy(&buffer[..read]));
                }
                for_thread.1.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        Ok(Console { shared, writer })
    }

    /// Returns the length of the output so far, as a mark to wait from.
    pub fn mark(&self) -> usize {
        lock(&self.shared.0).text.len()
    }

    /// Returns the output since a mark, without escape sequences.
    pub fn since(&self, mark: usize) -> String {
        plain(lock(&self.shared.0).text.get(mark..).unwrap_or_default())
    }

    /// Wait until words appear after a mark.
    pub fn expect(&self, mark: usize, words: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        let mut seen = lock(&self.shared.0);
        loop {
            let text = plain(seen.text.get(mark..).unwrap_or_default());
            if text.contains(words) {
                return Ok(());
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() || seen.closed {
                let from = text.char_indices().rev().nth(1500).map_or(0, |(i, _)| i);
                let why = if seen.closed { "the console closed" } else { "time is up" };
                bail!("waiting for {words:?} on the console: {why}; last lines:\n{}", &text[from..]);
            }
            seen = self.shared.1.wait_timeout(seen, left).map_or_else(|e| e.into_inner().0, |r| r.0);
        }
    }

    /// Type.
    pub fn send(&self, text: &str) -> Result<()> {
        (&self.writer).write_all(text.as_bytes())?;
        Ok(())
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
