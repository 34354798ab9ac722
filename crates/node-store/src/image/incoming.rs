//! A blocking reader of the pieces that an async task receives.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// Reads the pieces that an async task sends. Blocks while there is none.
pub(crate) struct Incoming {
    channel: mpsc::Receiver<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl Incoming {
    pub(crate) fn new(channel: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { channel, current: Vec::new(), at: 0 }
    }
}

impl Read for Incoming {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.current.len() {
            let Some(next) = self.channel.blocking_recv() else { return Ok(0) };
            self.current = next;
            self.at = 0;
        }
        let count = out.len().min(self.current.len() - self.at);
        out[..count].copy_from_slice(&self.current[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
