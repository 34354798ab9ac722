//! Pull: the layers of the image become objects in the node store.

use std::path::Path;
use std::time::Duration;

use tracing::warn;

use super::resolve::image_settings;
use crate::agent::retry::with_retry;
use crate::agent::{Context, Error, Ticket, storage};
use crate::preflight::Refusal;
use crate::report::{Phase, State};
use node_store::image::{Failure, Kind, ResolvedImage, Source};
use node_store::import::{self, PullOptions, PulledImage};
use node_store::store::{LockError, NodeStore};

/// Layers to objects in the node store.
pub(super) async fn pull(context: &Context, image: ResolvedImage, ticket: &Ticket) -> Result<PulledImage, Error> {
    let phase = Phase::Pull;
    let options = PullOptions { complete: context.settings.complete, ..PullOptions::default() };
    let pulled = store(context, &image, options, ticket).await?;
    context.tracker.update(|status| {
        status.commit = Some(pulled.commit.clone());
        status.cost.bytes_fetched = pulled.bytes_fetched;
    });
    for warning in &pulled.warnings {
        context.tracker.warn(warning);
    }
    context.tracker.end(phase, State::Running);
    Ok(pulled)
}

/// What a pull that was not complete left out, into the same store.
pub(super) async fn rest(context: &Context, pulled: &PulledImage, ticket: &Ticket) -> Result<PulledImage, Error> {
    let options = PullOptions { complete: true, expected: Some(pulled.commit.clone()), ..PullOptions::default() };
    store(context, &pulled.image, options, ticket).await
}

/// The objects of `image`, all or what a pivot needs, into the node store.
async fn store(
    context: &Context,
    image: &ResolvedImage,
    options: PullOptions,
    ticket: &Ticket,
) -> Result<PulledImage, Error> {
    let phase = Phase::Pull;
    context.tracker.begin(phase);
    with_retry(context, phase, ticket, || async {
        let (store, booted) =
            storage::open(&context.paths, &context.settings).map_err(|error| cannot_open(image, &error))?;
        if let Some(line) = wrong_domain(store.root()) {
            context.tracker.warn(line);
        }
        let source = Source::open(&image_settings(&context.settings)).await?;
        context.tracker.progress.reset();
        let progress = context.tracker.progress.clone();
        let pulled = import::pull(&source, image, &store, booted.as_ref(), &options, progress, ticket.token()).await;
        if matches!(&pulled, Err(failure) if failure.kind == Kind::NoSpace) {
            give_back(&store).await;
        }
        pulled
    })
    .await
}

fn cannot_open(image: &ResolvedImage, error: &anyhow::Error) -> Failure {
    if error.is::<Refusal>() {
        let message = format!("{}: {error}; nothing was fetched", image.pinned);
        return Failure::new(Kind::NoSpace, message);
    }
    Failure::new(Kind::Local, format!("{error:#}"))
}

/// Whether an image whose policy has types that the running one lacks cannot be stored. Most images have none,
/// so it is a warning; the first label that needs it is the error.
fn wrong_domain(store: &Path) -> Option<String> {
    if selinux_labels::mode() == selinux_labels::Mode::Disabled
        || selinux_labels::may_write_unknown(store).unwrap_or(true)
    {
        return None;
    }
    Some(selinux_labels::advice(selinux_labels::context().as_deref()))
}

/// On a disk that is full, everybody suffers: what was written for nothing goes at once.
async fn give_back(store: &NodeStore) {
    for _ in 0..50 {
        match store.discard_unpublished() {
            Ok(()) => return,
            // Threads of the pull that failed are still ending.
            Err(LockError::Held { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => return warn!("what was pulled so far stays on the disk until the next boot: {error}"),
        }
    }
    warn!("what was pulled so far stays on the disk until the next boot: somebody has its lock");
}
