//! One layer's bytes as they come out of the proxy.
//!
//! The proxy closes a layer's pipe only when asked to finish it. The size that the manifest gives says when to
//! ask; and when bytes stay away before that, asking tells whether the transfer broke.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Failure, Kind};

/// Bytes read at a time.
const READ: usize = 128 * 1024;
/// How long bytes may stay away before the proxy is asked what became of them.
const ASK_AFTER: Duration = Duration::from_secs(3);

/// The bytes of a layer, and in the end what the proxy says about them.
pub struct LayerStream<'a> {
    pub(super) name: String,
    pub(super) reader: Box<dyn AsyncRead + Send + Unpin + 'a>,
    pub(super) verdict: BoxFuture<'a, Result<(), Failure>>,
    pub(super) size: u64,
    pub(super) idle: Duration,
    pub(super) total: u64,
    pub(super) asked: bool,
    pub(super) answered: bool,
    pub(super) wrong: Option<Failure>,
}

impl LayerStream<'_> {
    /// The next piece; `None` at the end, once the proxy has found size and digest right. Errors:
    /// silence for too long, a broken transfer, a size or digest that the manifest does not name.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        if self.total >= self.size {
            return self.finish().await.map(|()| None);
        }
        // Filled without being zeroed first.
        let mut piece = Vec::with_capacity(READ);
        let (ask, deadline) = (Instant::now() + ASK_AFTER, Instant::now() + self.idle);
        loop {
            tokio::select! {
                biased;
                read = self.reader.read_buf(&mut piece) => {
                    let count = read.map_err(|error| self.fail(Kind::Network, format!("reading: {error}")))?;
                    if count == 0 {
                        // A short blob has a wrong digest too, but being short is the better reason:
                        // another attempt can help.
                        let short = format!("ended after {} of {} bytes", self.total, self.size);
                        return Err(self.fail(Kind::Truncated, short));
                    }
                    self.total += count as u64;
                    return Ok(Some(piece));
                }
                verdict = &mut self.verdict, if self.asked && !self.answered => {
                    self.answered = true;
                    match verdict {
                        // What is still in the pipe tells whether it is wrong or only short.
                        Err(failure) if failure.kind == Kind::BadDigest => self.wrong = Some(failure),
                        verdict => verdict?,
                    }
                }
                () = sleep_until(ask), if !self.asked => self.asked = true,
                () = sleep_until(deadline) => {
                    let silent = self.idle.as_secs();
                    return Err(self.fail(Kind::Network, format!("nothing came for {silent} s, after {} of {} bytes", self.total, self.size)));
                }
            }
        }
    }

    async fn finish(&mut self) -> Result<(), Failure> {
        let (mut extra, mut rest, mut ended) = (self.total - self.size, vec![0; 4096], false);
        while !ended || !self.answered {
            tokio::select! {
                verdict = &mut self.verdict, if !self.answered => {
                    self.answered = true;
                    verdict?;
                }
                read = self.reader.read(&mut rest), if !ended => {
                    // What is too much is read past: the proxy could not answer while it is stuck with it.
                    let count = read.map_err(|error| self.fail(Kind::Network, format!("reading: {error}")))?;
                    extra += count as u64;
                    ended = count == 0;
                }
                () = sleep(self.idle) => {
                    return Err(self.fail(Kind::Network, "the proxy does not finish it".to_owned()));
                }
            }
        }
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        if extra > 0 {
            return Err(self.fail(Kind::BadDigest, format!("has {extra} bytes more than the manifest says")));
        }
        Ok(())
    }

    fn fail(&self, kind: Kind, what: String) -> Failure {
        Failure::new(kind, format!("{}: {what}", self.name))
    }
}
