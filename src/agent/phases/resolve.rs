//! Resolve: the configured pull spec becomes a digest. Nothing is changed.

use std::path::Path;

use tracing::info;

use crate::agent::retry::with_retry;
use crate::agent::{CancelHandle, Error, StateDir};
use crate::config::{ImageSource, Registry, Settings};
use crate::host::{self, SCRIPT};
use crate::report::{Phase, State, Tracker};
use node_store::image::{self, Failure, ImageSettings, Kind, PULL_SCRIPT, ResolvedImage, Source, TagHints};

/// Parts of the phase: the start of skopeo, the release payload, the manifest.
const PARTS: usize = 3;

/// Resolves the configured pull spec to a digest, with retries.
pub(in crate::agent) async fn resolve(
    tracker: &Tracker,
    dir: &StateDir,
    settings: &Settings,
    cancel: &CancelHandle,
) -> Result<ResolvedImage, Error> {
    let Settings { image, image_tags, registry, .. } = settings;
    let phase = Phase::Resolve;
    tracker.begin(phase);
    let (image, choice) = with_retry(tracker, dir, registry.retry, phase, cancel, || async {
        let configured = wanted(image.as_ref()).await?;
        let source = Source::open(&image_settings(registry)).await?;
        tracker.share(0, 1, PARTS);
        let (spec, choice) = match &configured {
            ImageSource::Image(spec) => (spec.clone(), None),
            // The payload names the node image by digest, so no other image is accepted.
            ImageSource::Release(payload) => {
                let hints = tag_hints(image_tags.clone());
                let (spec, choice) = image::resolve_release(&source, payload, &hints).await?;
                (spec, Some(choice))
            }
        };
        tracker.share(0, 2, PARTS);
        Ok((source.resolve(&spec).await?, choice))
    })
    .await?;
    if let Some(choice) = &choice {
        info!("{choice}");
    }
    tracker.update(|status| {
        status.image.get_or_insert_with(|| image.requested.to_string());
        status.image_choice = choice;
        status.digest = Some(image.digest.to_string());
    });
    tracker.end(phase, State::Running);
    Ok(image)
}

/// Returns the sources for the name of the node image in a release payload.
fn tag_hints(configured: Option<Vec<String>>) -> TagHints {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    TagHints {
        configured,
        script: read(PULL_SCRIPT),
        os_release: read("/etc/os-release").or_else(|| read("/usr/lib/os-release")),
    }
}

/// Returns the configured source. If none is configured, returns the one in the installer's script.
///
/// # Errors
/// No source names a node image, or the installer's script fails.
pub(in crate::agent) async fn wanted(configured: Option<&ImageSource>) -> Result<ImageSource, Failure> {
    if let Some(configured) = configured {
        return Ok(configured.clone());
    }
    let script = Path::new(SCRIPT);
    match host::release_image(script).await {
        Ok(Some(spec)) => {
            info!("no node image is configured; {SCRIPT} names the release payload {spec}");
            Ok(ImageSource::Release(spec.parse()?))
        }
        Ok(None) => Err(Failure::new(
            Kind::BadPullSpec,
            "no node image is configured: set `image` or `release_image` in /etc/node-image-pivot.conf.d/*.toml, \
             or node-image-pivot.image= on the kernel command line",
        )),
        Err(error) => Err(Failure::new(Kind::Local, format!("{error:#}"))),
    }
}

pub(super) fn image_settings(registry: &Registry) -> ImageSettings {
    ImageSettings { authfile: registry.auth_file.clone(), ..ImageSettings::default() }
}
