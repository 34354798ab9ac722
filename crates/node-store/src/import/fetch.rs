//! Fetches one layer into the store. An async task reads from the proxy; one thread decompresses and digests, another
//! parses, hashes and writes. Bounded channels between them give back pressure and limit memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as blocking;

use tokio::sync::mpsc;

use crate::image::decompress::decompress;
use crate::image::incoming::Incoming;
use crate::image::{Failure, Kind, Layer, ResolvedImage};
use crate::layer_read::{Part, Reading, SpanResult};
use crate::store::ObjectType;

use super::encapsulated::{Consumed, Purpose, consume};
use super::image_refs;
use super::plain::{BaseFacts, LayerTree, read_plain};
use super::run::Run;
use super::state::stored_by_this_thread;

/// Capacity of the channel of compressed pieces (128 KiB each): 1 MiB for each layer.
const WAITING_READS: usize = 8;
/// Capacity of the channel of decompressed pieces (256 KiB each): 1.5 MiB for each layer.
const WAITING_PIECES: usize = 6;

/// Returns the name of a layer in messages.
pub(super) fn layer_name(image: &ResolvedImage, layer: &Layer) -> String {
    format!("{} layer {} ({})", image.pinned, layer.index, layer.digest())
}

/// Reads one layer of the encapsulated commit. Objects that it stored before a failure stay, because each was checked
/// by itself. Returns false if the read was abandoned: no object is wanted any more, and none of this layer was stored.
pub(super) async fn fetch_encapsulated(run: &Run<'_>, layer: &Layer, purpose: Purpose) -> Result<bool, Failure> {
    let import = run.import;
    let contributed = Arc::new(AtomicBool::new(false));
    let name = layer_name(run.image, layer);
    let work = {
        let (import, name, contributed) = (import.clone(), name.clone(), contributed.clone());
        move |archive: &mut Archive<'_>| consume(&import, &name, purpose, &contributed, archive)
    };
    match fetch_layer(run, layer, Some(contributed), work).await? {
        None => Ok(false),
        Some(Consumed { commit_meta, content }) => {
            if let Some((commit, content)) = commit_meta {
                let stored = import.writer.metadata(&commit, ObjectType::CommitMeta, &content);
                stored.map_err(|error| import.write_failure(&name, &error))?;
            }
            if purpose == Purpose::Chunk {
                let kept = image_refs::keep_content(&import.store, layer, &content);
                kept.map_err(|error| import.store_failure(&name, &error))?;
            }
            Ok(true)
        }
    }
}

/// Reads one plain layer.
pub(super) async fn fetch_plain(run: &Run<'_>, layer: &Layer, facts: &BaseFacts) -> Result<LayerTree, Failure> {
    let name = layer_name(run.image, layer);
    let work = {
        let (import, name, facts) = (run.import.clone(), name.clone(), facts.clone());
        move |archive: &mut Archive<'_>| read_plain(&import, &name, &facts, archive)
    };
    let tree = fetch_layer(run, layer, None, work).await?;
    tree.ok_or_else(|| Failure::new(Kind::Local, format!("internal error: abandoned the plain {name}")))
}

/// The decompressed archive, piece by piece.
type Archive<'a> = dyn FnMut() -> io::Result<Vec<u8>> + 'a;

/// Passes the archive of a layer to `work`. With `contributed`, the read is abandoned (`None`) as soon as no object is
/// wanted, unless `contributed` is true by then.
async fn fetch_layer<T: Send + 'static>(
    run: &Run<'_>,
    layer: &Layer,
    contributed: Option<Arc<AtomicBool>>,
    work: impl FnOnce(&mut Archive<'_>) -> Result<T, Failure> + Send + 'static,
) -> Result<Option<T>, Failure> {
    let reading = run.import.progress.begin_read(layer.index, layer.digest(), layer.size());
    let outcome = read_parts(run, layer, &reading, contributed, work).await;
    reading.end(match &outcome {
        Ok(Some(_)) => SpanResult::Done,
        Ok(None) => SpanResult::NotNeeded,
        Err(failure) if failure.kind == Kind::Cancelled => SpanResult::Interrupted,
        Err(_) => SpanResult::Failed,
    });
    outcome
}

/// Reads the layer with a thread for each part that needs the CPU.
async fn read_parts<T: Send + 'static>(
    &Run { source, image, import, cancel, .. }: &Run<'_>,
    layer: &Layer,
    reading: &Reading,
    contributed: Option<Arc<AtomicBool>>,
    work: impl FnOnce(&mut Archive<'_>) -> Result<T, Failure> + Send + 'static,
) -> Result<Option<T>, Failure> {
    let name = layer_name(image, layer);
    let mut reader = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
        reader = source.reader() => reader?,
    };
    let mut stream = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
        stream = reader.layer(image, layer) => stream?,
    };
    let (compressed, incoming) = mpsc::channel::<Vec<u8>>(WAITING_READS);
    let (pieces, archive) = blocking::sync_channel::<io::Result<Vec<u8>>>(WAITING_PIECES);
    let compression = layer.compression;
    let decoders = import.decoders.clone();
    let timer = reading.timer(Part::Decompress);
    let decompressor = tokio::task::spawn_blocking(move || {
        let (timer, mut bytes) = (timer.begin(), 0);
        let result = decompress(compression, Incoming::new(incoming), &decoders, &mut |piece| {
            bytes += piece.len() as u64;
            pieces.send(Ok(piece)).is_ok()
        });
        timer.end(bytes);
        if let Err(error) = &result {
            // The parser may have failed already, for its own, earlier reason.
            let _ = pieces.send(Err(io::Error::new(error.kind(), error.to_string())));
        }
        result
    });
    let timer = reading.timer(Part::Write);
    let parser = tokio::task::spawn_blocking(move || {
        let (timer, before) = (timer.begin(), stored_by_this_thread());
        let result = work(&mut || match archive.recv() {
            Ok(piece) => piece,
            Err(blocking::RecvError) => Ok(Vec::new()),
        });
        timer.end(stored_by_this_thread() - before);
        result
    });

    let (mut compressed, mut arrived) = (Some(compressed), 0);
    let verdict = loop {
        let unneeded = async {
            import.done().cancelled().await;
            if contributed.as_ref().is_none_or(|contributed| contributed.load(Ordering::Relaxed)) {
                // Objects of this layer were stored: read to the end, so that its digest is checked.
                std::future::pending::<()>().await;
            }
        };
        let piece = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
            () = unneeded => {
                import.progress.reduce_total(layer.size().saturating_sub(arrived));
                return Ok(None);
            }
            piece = stream.next() => piece,
        };
        let piece = match piece {
            Ok(Some(piece)) => piece,
            Ok(None) => break Ok(()),
            Err(failure) => break Err(failure),
        };
        arrived += piece.len() as u64;
        reading.fetched(arrived);
        import.fetched(piece.len() as u64);
        if let Some(channel) = &compressed {
            let sent = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
                sent = channel.send(piece) => sent,
            };
            // A thread failed. Read to the end nevertheless: the proxy then knows the blob's digest, and a wrong
            // digest explains the failure better.
            if sent.is_err() {
                compressed = None;
            }
        }
    };
    drop((compressed, stream));
    if verdict.is_ok() {
        reader.give_back();
    }
    let (diff_id, consumed) = (join(decompressor, &name).await?, join(parser, &name).await?);
    judge(&name, layer, verdict, diff_id, consumed).map(Some)
}

/// Selects the failure to report. A failure of the proxy explains those of the threads, and a failure of the parser counts
/// only for a blob whose digest is right.
fn judge<T>(
    name: &str,
    layer: &Layer,
    verdict: Result<(), Failure>,
    diff_id: io::Result<[u8; 32]>,
    consumed: Result<T, Failure>,
) -> Result<T, Failure> {
    if let Err(failure) = &consumed
        && matches!(failure.kind, Kind::NoSpace | Kind::Local)
    {
        return consumed;
    }
    verdict?;
    // The blob has the digest of the manifest, so any further fault is part of the image itself.
    let consumed = consumed.map_err(|failure| match failure.kind {
        Kind::Truncated => Failure::new(Kind::BadFormat, failure.message),
        Kind::BadDigest => badly_built(failure.message),
        _ => failure,
    })?;
    let diff_id =
        diff_id.map_err(|error| Failure::new(Kind::BadFormat, format!("cannot decompress {name}: {error}")))?;
    let actual = format!("sha256:{}", hex::encode(diff_id));
    if actual != layer.diff_id {
        return Err(badly_built(format!("{name}: its archive has the diff id {actual}, not {}", layer.diff_id)));
    }
    Ok(consumed)
}

/// Returns the failure of an image whose blobs have the right digests but invalid content.
fn badly_built(message: String) -> Failure {
    const ADVICE: &str = "the image was built wrong, and every registry serves the same content: rebuild it with \
                          current versions of ostree and rpm-ostree, or use another node image";
    Failure { advice: ADVICE, ..Failure::new(Kind::BadFormat, message) }
}

async fn join<T>(task: tokio::task::JoinHandle<T>, name: &str) -> Result<T, Failure> {
    task.await.map_err(|error| {
        Failure::new(Kind::Local, format!("internal error: a thread that reads {name} failed: {error}"))
    })
}

/// Returns the failure of a pull that the caller cancelled.
pub(super) fn cancelled(image: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Cancelled, format!("the pull of {image} was cancelled"))
}
