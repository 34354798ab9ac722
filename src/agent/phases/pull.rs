//! Pull: the layers of the image become objects in the node store.

use std::path::Path;
use std::time::Duration;

use tracing::warn;

use super::resolve::image_settings;
use crate::agent::retry::with_retry;
use crate::agent::{CancelHandle, Error, StateDir, storage};
use crate::config::{Registry, StoreSettings};
use crate::preflight::Refusal;
use crate::report::{Phase, State, Tracker};
use node_store::image::{Failure, Kind, ResolvedImage, Source};
use node_store::import::{self, PullOptions, PulledImage};
use node_store::store::{LockError, NodeStore};

/// The store of a pull, and the way to it.
pub(super) struct Target<'a> {
    pub(super) tracker: &'a Tracker,
    pub(super) dir: &'a StateDir,
    pub(super) registry: &'a Registry,
    pub(super) store: StoreSettings,
}

/// Imports the layers of the image as objects into the node store.
pub(super) async fn pull(
    target: &Target<'_>,
    image: ResolvedImage,
    complete: bool,
    cancel: &CancelHandle,
) -> Result<PulledImage, Error> {
    let tracker = target.tracker;
    let options = PullOptions { complete, ..PullOptions::default() };
    let pulled = store(target, &image, options, cancel).await?;
    tracker.update(|status| {
        status.commit = Some(pulled.commit.to_string());
        status.cost.bytes_fetched = pulled.bytes_fetched;
    });
    tracker.warn_all(&pulled.warnings);
    tracker.end(Phase::Pull, State::Running);
    Ok(pulled)
}

/// Pulls the content that an incomplete pull left out, into the same store.
pub(super) async fn rest(
    target: &Target<'_>,
    pulled: &PulledImage,
    cancel: &CancelHandle,
) -> Result<PulledImage, Error> {
    let options = PullOptions { complete: true, expected: Some(pulled.commit), ..PullOptions::default() };
    store(target, &pulled.image, options, cancel).await
}

/// Pulls the objects of `image`, all or those that a pivot needs, into the node store, with retries.
async fn store(
    &Target { tracker, dir, registry, store }: &Target<'_>,
    image: &ResolvedImage,
    options: PullOptions,
    cancel: &CancelHandle,
) -> Result<PulledImage, Error> {
    let phase = Phase::Pull;
    tracker.begin(phase);
    with_retry(tracker, dir, registry.retry, phase, cancel, || async {
        let (store, booted) = storage::open(dir, store).map_err(|error| cannot_open(image, &error))?;
        if let Some(line) = wrong_domain(store.root()) {
            tracker.warn(line);
        }
        let source = Source::open(&image_settings(registry)).await?;
        tracker.progress.reset();
        let progress = tracker.progress.clone();
        let pulled = import::pull(&source, image, &store, booted.as_ref(), &options, progress, cancel.token()).await;
        if matches!(&pulled, Err(failure) if failure.kind == Kind::NoSpace) {
            discard_unpublished(&store).await;
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

/// Returns a warning if the agent's domain may not write labels that the running policy lacks. Most images have no such
/// labels, so only the first one that needs the permission is an error.
fn wrong_domain(store: &Path) -> Option<String> {
    if selinux_labels::mode() == selinux_labels::Mode::Disabled
        || selinux_labels::may_write_unknown(store).unwrap_or(true)
    {
        return None;
    }
    Some(selinux_labels::advice(selinux_labels::context().as_deref()))
}

/// Removes the unpublished objects at once, because a full disk affects all services.
async fn discard_unpublished(store: &NodeStore) {
    for _ in 0..50 {
        match store.discard_unpublished() {
            Ok(()) => return,
            // Threads of the failed pull still hold the lock for a moment.
            Err(LockError::Held { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => return warn!("unpublished objects stay on the disk until the next boot: {error}"),
        }
    }
    warn!("unpublished objects stay on the disk until the next boot: another process holds the lock of the store");
}
