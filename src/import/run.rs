//! What the steps of one pull share: the run itself, and reading several layers at once.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::image::{Failure, Kind, ResolvedImage, Source};
use crate::store::{LayerJournal, Scope};

use super::layertree::LayerTree;
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
    Plain(usize, LayerTree),
}

/// Several reads at once. Boxed, because the compiler cannot see through it that pulls can be spawned.
pub(super) fn all_of(reads: Vec<DueRead<'_>>, parallel: usize) -> BoxStream<'_, Result<Read, Failure>> {
    stream::iter(reads).buffer_unordered(parallel.max(1)).boxed()
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
