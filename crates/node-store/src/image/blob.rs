//! The stream of one layer from the proxy.
//!
//! The proxy closes a layer's pipe only after a request to finish the layer. The reader sends this request when it has
//! read as many bytes as the manifest lists. It also sends the request when no bytes arrive for a while, because the
//! answer shows if the transfer failed.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, sleep, sleep_until};

use super::{Failure, Kind, PullSpec};

/// Bytes in one read.
const READ: usize = 128 * 1024;
/// Time without bytes after which the proxy is asked to finish the layer.
const ASK_AFTER: Duration = Duration::from_secs(3);

/// The bytes of a layer, and at the end the proxy's verdict about size and digest.
pub struct LayerStream<'a> {
    pub(super) name: String,
    pub(super) spec: PullSpec,
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
    /// Returns the next piece, or `None` at the end, after the proxy has confirmed size and digest.
    ///
    /// # Errors
    /// No bytes for longer than the idle timeout, a failed transfer, or a size or digest that differs from the manifest.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let piece = self.read().await;
        piece.map_err(|failure| self.spec.adapt(failure))
    }

    async fn read(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        if self.total >= self.size {
            return self.finish().await.map(|()| None);
        }
        // `read_buf` fills the capacity, so it need not be zeroed.
        let mut piece = Vec::with_capacity(READ);
        let (ask, deadline) = (Instant::now() + ASK_AFTER, Instant::now() + self.idle);
        loop {
            tokio::select! {
                biased;
                read = self.reader.read_buf(&mut piece) => {
                    let count = read.map_err(|error| self.fail(Kind::Network, format!("cannot read the layer: {error}")))?;
                    if count == 0 {
                        // A short blob also has a wrong digest, but `Truncated` is retried.
                        let short = format!("the layer ended after {} of {} bytes", self.total, self.size);
                        return Err(self.fail(Kind::Truncated, short));
                    }
                    self.total += count as u64;
                    return Ok(Some(piece));
                }
                verdict = &mut self.verdict, if self.asked && !self.answered => {
                    self.answered = true;
                    match verdict {
                        // The rest of the pipe shows if the blob is wrong or only short.
                        Err(failure) if failure.kind == Kind::BadDigest => self.wrong = Some(failure),
                        verdict => verdict?,
                    }
                }
                () = sleep_until(ask), if !self.asked => self.asked = true,
                () = sleep_until(deadline) => {
                    let silent = self.idle.as_secs();
                    return Err(self.fail(Kind::Network, format!("received nothing for {silent} s, after {} of {} bytes", self.total, self.size)));
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
                    // Excess bytes are read too: the proxy does not answer until the pipe is empty.
                    let count = read.map_err(|error| self.fail(Kind::Network, format!("cannot read the layer: {error}")))?;
                    extra += count as u64;
                    ended = count == 0;
                }
                () = sleep(self.idle) => {
                    return Err(self.fail(Kind::Network, "skopeo did not finish the layer in time".to_owned()));
                }
            }
        }
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        if extra > 0 {
            return Err(self.fail(Kind::BadDigest, format!("the layer has {extra} bytes more than the manifest lists")));
        }
        Ok(())
    }

    fn fail(&self, kind: Kind, cause: String) -> Failure {
        Failure::new(kind, format!("{}: {cause}", self.name))
    }
}
