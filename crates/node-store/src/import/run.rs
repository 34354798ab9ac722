//! What the steps of one pull share: the run itself, and reading several layers at once.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::image::{Failure, Kind, ResolvedImage, Source};
use crate::store::{LayerJournal, Scope};

use super::plain::LayerTree;
use super::state::Import;

/// One run over an image's layers.
pub(super) struct Run<'a> {
    pub(super) source: &'a Source,
    pub(super) image: &'a ResolvedImage,
    pub(super) import: &'a Arc<Import>,
    pub(super) journal: &'a LayerJournal,
    pub(super) scope: &'a Scope,
    pub(super) cancel: &'a CancellationToken,
}

impl Run<'_> {
    /// Refuses to go on while wanted objects have not come, though all layers were read.
    pub(super) fn nothing_is_missing(&self) -> Result<(), Failure> {
        match self.import.still_wanted() {
            Some((0, _)) => Ok(()),
            Some((count, Some(example))) => {
                let message =
                    format!("{} lacks {count} objects of its own commit, {example}.file for one", self.image.pinned);
                Err(Failure::new(Kind::BadFormat, message))
            }
            _ => Err(Failure::new(Kind::Local, format!("{}: nothing is known to be wanted", self.image.pinned))),
        }
    }
}

/// How reading a layer ended.
pub(super) enum Read {
    /// It was given up, or not begun, because nothing is wanted any more.
    NotNeeded,
    /// This layer of the commit was read.
    Encapsulated(usize),
    /// This plain layer (position in the manifest) was read, and this is in it.
    Plain(usize, Arc<LayerTree>),
}

/// Reads several layers at once and passes each to `note`.
///
/// A layer that failed, but may come at the next attempt, does not end the others: what they bring need not be
/// fetched again. As soon as so many have failed in a row as are read at once, the registry is to blame and the
/// rest is not tried. Returns the first failure.
pub(super) async fn all_of(
    reads: Vec<DueRead<'_>>,
    parallel: usize,
    mut note: impl FnMut(Read),
) -> Result<(), Failure> {
    let parallel = parallel.max(1);
    // Boxed, because the compiler cannot see through it that pulls can be spawned.
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
    first.map_or(Ok(()), Err)
}

/// A read that has not begun.
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
