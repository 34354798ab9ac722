//! State shared by the steps of one pull, and the reading of several layers at once.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::image::decompress::Decoders;
use crate::image::{Failure, Kind, ResolvedImage, Source};
use crate::store::{LayerJournal, Scope};

use super::plain::KeptTree;
use super::state::Import;

/// One run over the layers of an image.
pub(super) struct Run<'a> {
    pub(super) source: &'a Source,
    pub(super) image: &'a ResolvedImage,
    pub(super) import: &'a Arc<Import>,
    pub(super) journal: &'a LayerJournal,
    pub(super) scope: &'a Scope,
    pub(super) cancel: &'a CancellationToken,
}

impl Run<'_> {
    /// Returns an error if all layers were read and objects are still wanted.
    pub(super) fn nothing_is_missing(&self) -> Result<(), Failure> {
        match self.import.still_wanted() {
            Some((0, _)) => Ok(()),
            Some((count, Some(example))) => {
                let message = format!(
                    "{} is incomplete: its layers lack {count} objects of its commit, for example {example}.file",
                    self.image.pinned
                );
                Err(Failure::new(Kind::BadFormat, message))
            }
            _ => Err(Failure::new(
                Kind::Local,
                format!("internal error: the wanted set of {} was never computed", self.image.pinned),
            )),
        }
    }
}

/// Result of reading one layer.
pub(super) enum Read {
    /// Abandoned or not started, because no object is wanted any more.
    NotNeeded,
    /// Layer of the encapsulated commit, by its position in the manifest.
    Encapsulated(usize),
    /// Plain layer, by its position in the manifest, and its content.
    Plain(usize, KeptTree),
}

/// Reads several layers at once and passes each to `note`.
///
/// A transient failure of one layer does not stop the others, so that the next attempt need not fetch them. If
/// `parallel` layers fail in a row, the registry is probably at fault, and the remaining layers are not tried. Returns
/// the first failure.
pub(super) async fn all_of(
    reads: Vec<DueRead<'_>>,
    parallel: usize,
    decoders: &Decoders,
    mut note: impl FnMut(Read),
) -> Result<(), Failure> {
    let parallel = parallel.max(1);
    // Boxed, because otherwise the compiler cannot prove that the future of a pull is `Send`.
    let mut reads: BoxStream<'_, Result<Read, Failure>> = stream::iter(reads).buffer_unordered(parallel).boxed();
    let (mut first, mut in_a_row) = (None, 0);
    while let Some(read) = reads.next().await {
        match read {
            Ok(read) => {
                in_a_row = 0;
                note(read);
            }
            Err(failure) if failure.class.may_pass() => {
                in_a_row += 1;
                if in_a_row >= parallel {
                    return Err(first.unwrap_or(failure));
                }
                tracing::warn!("continuing with the other layers: {}", failure.message);
                first.get_or_insert(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    // The merge of plain layers needs the memory.
    decoders.free();
    first.map_or(Ok(()), Err)
}

/// A read that has not started.
pub(super) type DueRead<'a> = BoxFuture<'a, Result<Read, Failure>>;

pub(super) async fn blocking<T: Send + 'static>(
    image: &ResolvedImage,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| local(image, error))
}

pub(super) fn local(image: &ResolvedImage, error: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Local, format!("{}: {error}", image.pinned))
}
