//! Images in registries and on this machine: pull specs, manifests, layer streams, release payloads, and the classes of
//! failures.
//!
//! This module turns a pull spec into a verified manifest, config and layer streams. It uses `containers-image-proxy`:
//! skopeo handles registries.conf, mirrors, policy.json, proxies and auth files. The module also finds the node image that
//! a release payload names, decides which failures are retried, and decompresses and parses layers. It does not touch
//! ostree repos or the running system.

mod blob;
mod choice;
mod classify;
pub(crate) mod decompress;
mod failure;
pub(crate) mod incoming;
mod layout;
mod policy;
mod pool;
mod reader;
pub(crate) mod references;
mod release;
mod source;
mod sparse;
mod spec;
mod stream;
mod system;
pub(crate) mod tarstream;

pub use blob::LayerStream;
pub use choice::ImageChoice;
use classify::classify;
pub use failure::{Class, Endpoint, Failure, Kind};
pub use layout::{Compression, Encapsulated, Layer, Layout, layout, machine_architecture};
pub use pool::ImageSettings;
pub use reader::Reader;
pub use release::resolve_release;
pub use source::{ImageDescription, Source};
pub use spec::{Digest, LocalSpec, PullSpec, RegistrySpec, Transport};
pub use stream::{PULL_SCRIPT, TagHints};
pub use system::System;

use serde::{Deserialize, Serialize};

/// Result of the resolve phase: one image, pinned by digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedImage {
    /// Pull spec as the operator wrote it.
    pub requested: PullSpec,
    /// Pull spec of the same image by digest: `registry/name@sha256:…`.
    pub pinned: PullSpec,
    /// Digest of the manifest for this machine's architecture.
    pub digest: Digest,
}
