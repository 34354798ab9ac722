//! Resolve and pull, with retries. Nothing here changes the running system.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::{info, warn};

use super::retry::{Next, Retries};
use super::{Context, Error, Ticket, storage};
use crate::config::{ImageSource, Settings};
use crate::host::{self, SCRIPT};
use crate::preflight::Refusal;
use crate::report::{Phase, State};
use node_store::image::{self, Failure, ImageSettings, Kind, PULL_SCRIPT, ResolvedImage, Source, TagHints};
use node_store::import::{self, PullOptions, PulledImage};
use node_store::store::{LockError, NodeStore};

/// Pull spec to digest.
pub(super) async fn resolve(context: &Context, ticket: &Ticket) -> Result<ResolvedImage, Error> {
    let phase = Phase::Resolve;
    context.tracker.begin(phase);
    let (image, choice) = with_retry(context, phase, ticket, || async {
        let configured = wanted(&context.settings).await?;
        let source = Source::open(&image_settings(&context.settings)).await?;
        let (spec, choice) = match &configured {
            ImageSource::Image(text) => (text.parse()?, None),
            // The payload names the node image by digest: nothing else is accepted from here on.
            ImageSource::Release(text) => {
                let hints = tag_hints(&context.settings);
                let (spec, choice) = image::resolve_release(&source, &text.parse()?, &hints).await?;
                (spec, Some(choice))
            }
        };
        Ok((source.resolve(&spec).await?, choice))
    })
    .await?;
    if let Some(choice) = &choice {
        info!("{choice}");
    }
    context.tracker.update(|status| {
        status.image.get_or_insert_with(|| image.requested.clone());
        status.image_choice = choice;
        status.digest = Some(image.digest.clone());
    });
    context.tracker.end(phase, State::Running);
    Ok(image)
}

/// Returns what decides about the tag of a release payload.
fn tag_hints(settings: &Settings) -> TagHints {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    TagHints {
        configured: settings.image_tags.clone(),
        script: read(PULL_SCRIPT),
        os_release: read("/etc/os-release").or_else(|| read("/usr/lib/os-release")),
    }
}

/// What is configured; where nothing is, what the installer's own script names.
async fn wanted(settings: &Settings) -> Result<ImageSource, Failure> {
    if let Some(configured) = &settings.image {
        return Ok(configured.clone());
    }
    let script = Path::new(SCRIPT);
    match host::release_image(script).await {
        Ok(Some(spec)) => {
            info!("no node image is configured; {SCRIPT} names the release payload {spec}");
            Ok(ImageSource::Release(spec))
        }
        Ok(None) => Err(Failure::new(
            Kind::BadPullSpec,
            "no node image is configured: set `image` or `release_image` in /etc/node-image-pivot.conf.d/*.toml, \
             or node-image-pivot.image= on the kernel command line",
        )),
        Err(error) => Err(Failure::new(Kind::Local, format!("{error:#}"))),
    }
}

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

/// Runs `attempt` until it succeeds, ends or is cancelled. The status document shows each failure with its class, its
/// number and the time of the next attempt.
async fn with_retry<T, F>(context: &Context, phase: Phase, ticket: &Ticket, attempt: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut retries = Retries::new(context.settings.retry);
    loop {
        let outcome = tokio::select! {
            outcome = attempt() => outcome,
            () = ticket.cancelled() => return Err(Error::cancelled()),
        };
        let failure = match outcome {
            Ok(value) => return Ok(value),
            Err(_) if ticket.is_cancelled() => return Err(Error::cancelled()),
            Err(failure) => failure,
        };
        let next = retries.after(&failure, Instant::now(), rand::random());
        let error = retries.told(&failure, unix_now(), next);
        let delay = match next {
            Next::Wait { delay, .. } => delay,
            Next::End(limit) => return Err(retries.end(failure, limit)),
        };
        warn!(
            phase = phase.as_str(),
            class = failure.kind.as_str(),
            attempt = error.attempt,
            next_in_seconds = delay.as_secs(),
            "{failure}"
        );
        context.tracker.fail(error);
        tokio::select! {
            () = tokio::time::sleep(delay) => context.tracker.begin(phase),
            () = ticket.cancelled() => return Err(Error::cancelled()),
        }
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn image_settings(settings: &Settings) -> ImageSettings {
    ImageSettings { authfile: settings.auth_file.clone(), ..ImageSettings::default() }
}
