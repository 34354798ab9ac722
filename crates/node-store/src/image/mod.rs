//! Pull specs, the image proxy, and what can go wrong on the way to a manifest.
//!
//! This room turns a pull spec into a verified manifest, config and layer streams through
//! `containers-image-proxy` (skopeo: registries.conf, mirrors, policy.json, proxies and auth files,
//! none of it reimplemented), finds the node image that a release payload names, and classifies every
//! failure as worth retrying or not. What layers are made of (compression, tar) is read here too.
//! It may not touch ostree, the store, or the running system.

mod blob;
mod choice;
mod classify;
pub(crate) mod decompress;
mod failure;
pub(crate) mod incoming;
mod layout;
mod policy;
mod proxy;
pub(crate) mod references;
mod release;
mod source;
mod sparse;
mod spec;
mod stream;
pub(crate) mod tarstream;

pub use blob::LayerStream;
pub use choice::ImageChoice;
pub use classify::{Verdict, classify};
pub use failure::{Class, Endpoint, Failure, Kind};
pub use layout::{Compression, Layer, Layout, layout, machine_architecture};
pub use proxy::Reader;
pub use release::resolve_release;
pub use source::{ImageDescription, ImageSettings, Source};
pub use spec::PullSpec;
pub use stream::{PULL_SCRIPT, TagHints};

use serde::{Deserialize, Serialize};

/// What resolve hands to pull: one image, pinned by digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedImage {
    /// The pull spec as the operator wrote it.
    pub requested: String,
    /// The same image by digest: `registry/name@sha256:…`.
    pub pinned: String,
    /// The digest of the (per-architecture) manifest: `sha256:…`.
    pub digest: String,
}
