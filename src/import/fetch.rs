//! One layer from the registry into the store: the async end that reads from the proxy, and the two
//! threads behind it (decompress and digest; parse, hash and write). Bounded channels between them
//! are the back pressure and the bound on memory.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as blocking;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::image::{Failure, Kind, Layer, ResolvedImage, Source};
use crate::store::ObjectType;

use super::consume::{Consumed, Purpose, consume};
use super::decompress::decompress;
use super::state::Import;

/// How many pieces of the blob (128 KiB each) may wait: 1 MiB a layer.
const WAITING_READS: usize = 8;
/// How many decompressed pieces (256 KiB each) may wait: 1.5 MiB a layer.
const WAITING_PIECES: usize = 6;

/// How reading a layer ended, when it did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Read to its end; digest and diff id are right.
    Whole,
    /// Given up because nothing is wanted any more, and nothing had been taken from it.
    NotNeeded,
}

/// Reads one layer. What it stored before a failure stays: each object was checked by itself.
pub(super) async fn fetch_layer(
    source: &Source,
    image: &ResolvedImage,
    layer: &Layer,
    purpose: Purpose,
    import: &Arc<Import>,
    cancel: &CancellationToken,
) -> Result<Outcome, Failure> {
    let name = format!("{} layer {} ({})", image.pinned, layer.index, layer.digest());
    let mut stream = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
        stream = source.layer(image, layer) => stream?,
    };
    let contributed = Arc::new(AtomicBool::new(false));
    let (compressed, incoming) = mpsc::channel::<Vec<u8>>(WAITING_READS);
    let (pieces, archive) = blocking::sync_channel::<io::Result<Vec<u8>>>(WAITING_PIECES);
    let compression = layer.compression;
    let decompressor = tokio::task::spawn_blocking(move || {
        let result = decompress(compression, Incoming::new(incoming), &mut |piece| pieces.send(Ok(piece)).is_ok());
        if let Err(error) = &result {
            // The parser may be gone already; then it has its own, earlier, reason.
            let _ = pieces.send(Err(io::Error::new(error.kind(), error.to_string())));
        }
        result
    });
    let parser = {
        let (import, name, contributed) = (import.clone(), name.clone(), contributed.clone());
        tokio::task::spawn_blocking(move || {
            consume(&import, &name, purpose, &contributed, || match archive.recv() {
                Ok(piece) => piece,
                Err(blocking::RecvError) => Ok(Vec::new()),
            })
        })
    };

    let mut compressed = Some(compressed);
    let verdict = loop {
        let unneeded = async {
            import.done.cancelled().await;
            if contributed.load(Ordering::Relaxed) {
                // It holds something that was taken: read on, until its digest is known to be right.
                std::future::pending::<()>().await;
            }
        };
        let piece = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
            () = unneeded => return Ok(Outcome::NotNeeded),
            piece = stream.next() => piece,
        };
        let piece = match piece {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        import.fetched(piece.len() as u64);
        if let Some(channel) = &compressed {
            let sent = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
                sent = channel.send(piece) => sent,
            };
            // The threads have given up. Why is best told by the proxy, which knows the blob's digest
            // once all of it went by: go on reading, for the verdict's sake.
            if sent.is_err() {
                compressed = None;
            }
        }
    };
    drop(compressed);
    let (diff_id, consumed) = (join(decompressor, &name).await?, join(parser, &name).await?);
    judge(&name, layer, verdict, diff_id, consumed).and_then(|consumed| finish(import, &name, &consumed))
}

/// Puts the answers of the proxy and both threads in order: the proxy's reason explains the threads',
/// and a parser's reason is only believed of a blob that is known to be the right one.
fn judge(
    name: &str,
    layer: &Layer,
    verdict: Result<(), Failure>,
    diff_id: io::Result<[u8; 32]>,
    consumed: Result<Consumed, Failure>,
) -> Result<Consumed, Failure> {
    if let Err(failure) = &consumed
        && matches!(failure.kind, Kind::NoSpace | Kind::Local)
    {
        return consumed;
    }
    verdict?;
    // From here on the blob is what the manifest names: whatever is wrong was built that way.
    let consumed = consumed.map_err(|failure| match failure.kind {
        Kind::Truncated => Failure::new(Kind::BadFormat, failure.message),
        _ => failure,
    })?;
    let diff_id = diff_id.map_err(|error| Failure::new(Kind::BadFormat, format!("{name}: decompressing: {error}")))?;
    let actual = format!("sha256:{}", hex::encode(diff_id));
    if actual != layer.diff_id {
        let message = format!("{name}: its archive has the diff id {actual}, not {}", layer.diff_id);
        return Err(Failure::new(Kind::BadDigest, message));
    }
    Ok(consumed)
}

fn finish(import: &Import, name: &str, consumed: &Consumed) -> Result<Outcome, Failure> {
    if let Some(content) = &consumed.commit_meta {
        let stored = import.writer.metadata(&import.commit, ObjectType::CommitMeta, content);
        stored.map_err(|error| import.write_failure(name, &error))?;
    }
    Ok(Outcome::Whole)
}

async fn join<T>(task: tokio::task::JoinHandle<T>, name: &str) -> Result<T, Failure> {
    task.await.map_err(|error| Failure::new(Kind::Local, format!("{name}: a thread failed: {error}")))
}

/// What a caller gets who asked to stop.
pub(super) fn cancelled(image: &str) -> Failure {
    Failure::new(Kind::Cancelled, format!("the pull of {image} was cancelled"))
}

/// The decompressor's view of the pieces that the async end sends.
struct Incoming {
    channel: mpsc::Receiver<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl Incoming {
    fn new(channel: mpsc::Receiver<Vec<u8>>) -> Self {
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
