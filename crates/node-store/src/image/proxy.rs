//! One skopeo process, driven over its socket by one reader.
//!
//! A proxy that was asked to finish a layer answers nothing else until the last byte of that layer has come. With a
//! process for each reader, a registry that stalls one layer holds up only the reader of that layer.

use std::sync::Arc;
use std::sync::mpsc;

use containers_image_proxy::{Error as ProxyError, ImageProxy, ImageProxyConfig, OpenedImage};
use futures_util::FutureExt;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;

use super::policy::policy_path;
use super::{Failure, Kind, Layer, LayerStream, PullSpec, ResolvedImage, Source, classify};

/// A running skopeo, and the image that it has open.
pub(super) struct Proxy {
    skopeo: ImageProxy,
    opened: Option<(String, Arc<OpenedImage>)>,
    _parent: Parent,
}

/// Keeps the thread whose child skopeo is. The kernel ends skopeo together with that thread (PR_SET_PDEATHSIG in
/// prctl(2)), even while skopeo waits for a silent registry and would not notice that its reader is gone.
struct Parent(#[allow(dead_code)] mpsc::Sender<()>);

impl Proxy {
    pub(super) async fn start(config: ImageProxyConfig) -> Result<Self, Failure> {
        let cannot = |why: &dyn std::fmt::Display| Failure::new(Kind::Local, format!("cannot start skopeo: {why}"));
        let (sender, started) = tokio::sync::oneshot::channel();
        let (parent, dropped) = mpsc::channel();
        let runtime = tokio::runtime::Handle::current();
        let body = move || {
            if sender.send(runtime.block_on(ImageProxy::new_with_config(config))).is_ok() {
                // Ends with an error as soon as the other end is dropped.
                let _ = dropped.recv();
            }
        };
        std::thread::Builder::new().name("image-proxy".to_owned()).spawn(body).map_err(|error| cannot(&error))?;
        let skopeo = started.await.map_err(|error| cannot(&error))?.map_err(|error| cannot(&error))?;
        Ok(Self { skopeo, opened: None, _parent: Parent(parent) })
    }
}

/// A proxy at work for one reader. One that is dropped, for example after a failure, ends its skopeo process.
pub struct Reader<'a> {
    pub(super) source: &'a Source,
    pub(super) proxy: Proxy,
}

impl Reader<'_> {
    /// Keeps the proxy for the next reader. Only after a success: after a failure it may be in any state.
    pub fn give_back(self) {
        self.source.take_back(self.proxy);
    }

    /// Starts to fetch a layer.
    pub async fn layer(&mut self, image: &ResolvedImage, layer: &Layer) -> Result<LayerStream<'_>, Failure> {
        let name = format!("{} layer {} ({})", image.pinned, layer.index, layer.digest());
        let opened = self.opened(image).await?;
        // The raw variant of newer proxies leaves the digest to us; this one verifies it in skopeo,
        // in another process and so on another core.
        let blob = self.proxy.skopeo.get_blob(&opened, layer.descriptor.digest(), layer.size());
        let (reader, verdict) = self.request(&name, "layer", blob).await?;
        let stream_name = name.clone();
        let verdict = verdict.map(move |result| result.map_err(|error| failure(&name, "layer", &error))).boxed();
        Ok(LayerStream {
            name: stream_name,
            reader: Box::new(reader),
            verdict,
            size: layer.size(),
            idle: self.source.patience(),
            total: 0,
            asked: false,
            answered: false,
            wrong: None,
        })
    }

    /// Opens the image that `spec` names, and pins it by digest.
    pub(super) async fn resolve(&mut self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let requested = spec.to_string();
        let opened = self.open(&requested).await?;
        let (digest, _) = self.raw_manifest(&requested, &opened).await?;
        let pinned = spec.pinned(&digest);
        self.proxy.opened = Some((pinned.clone(), opened));
        Ok(ResolvedImage { requested, pinned, digest })
    }

    /// The manifest and config of an image, checked against its digest.
    pub(super) async fn manifest(
        &mut self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageConfiguration), Failure> {
        let name = &image.pinned;
        let opened = self.opened(image).await?;
        let (digest, raw) = self.raw_manifest(name, &opened).await?;
        if digest != image.digest {
            let message = format!("the registry answered with manifest {digest} when asked for {name}");
            return Err(Failure::new(Kind::BadDigest, message));
        }
        let manifest: ImageManifest = serde_json::from_slice(&raw)
            .map_err(|error| Failure::new(Kind::BadFormat, format!("the manifest of {name} is malformed: {error}")))?;
        let converted = sha256(&raw) != digest;
        let raw = self.config(name, &opened, &manifest, converted).await?;
        let config: ImageConfiguration = serde_json::from_slice(&raw)
            .map_err(|error| Failure::new(Kind::BadFormat, format!("the config of {name} is malformed: {error}")))?;
        Ok((manifest, config))
    }

    async fn opened(&mut self, image: &ResolvedImage) -> Result<Arc<OpenedImage>, Failure> {
        if let Some((pinned, opened)) = &self.proxy.opened
            && *pinned == image.pinned
        {
            return Ok(opened.clone());
        }
        let opened = match self.open(&image.pinned).await {
            Err(refused) if refused.kind == Kind::Policy && image.requested != image.pinned => {
                self.open_as_requested(image, refused).await?
            }
            opened => opened?,
        };
        self.proxy.opened = Some((image.pinned.clone(), opened.clone()));
        Ok(opened)
    }

    /// The image by the name that it was asked for. Signatures, and scopes of the policy, may be those of a
    /// tag or of an index, and say nothing about the one manifest in it. What the policy accepts under that
    /// name must be the pinned manifest still, or the refusal stands.
    async fn open_as_requested(&self, image: &ResolvedImage, refused: Failure) -> Result<Arc<OpenedImage>, Failure> {
        let opened = match self.open(&image.requested).await {
            Ok(opened) => opened,
            Err(failure) if failure.class.may_pass() => return Err(failure),
            Err(_) => return Err(refused),
        };
        let (digest, _) = self.raw_manifest(&image.requested, &opened).await?;
        if digest == image.digest { Ok(opened) } else { Err(refused) }
    }

    async fn open(&self, name: &str) -> Result<Arc<OpenedImage>, Failure> {
        self.source.check_policy(name)?;
        let reference = format!("docker://{name}");
        self.request(name, "image", self.proxy.skopeo.open_image(&reference)).await.map(Arc::new)
    }

    /// The config's bytes, as the manifest's digest names them.
    ///
    /// It is a blob like any other, unless the manifest was converted from docker's form: then it names a
    /// config that was converted too, which is in no registry and which only the proxy's "full config" is.
    async fn config(
        &self,
        name: &str,
        opened: &OpenedImage,
        manifest: &ImageManifest,
        converted: bool,
    ) -> Result<Vec<u8>, Failure> {
        const LARGEST: u64 = 8 << 20;
        let descriptor = manifest.config();
        let expected = descriptor.digest().to_string();
        if converted {
            let full = self.request(name, "config", self.proxy.skopeo.fetch_config_raw(opened)).await?;
            if sha256(&full) == expected {
                return Ok(full);
            }
        }
        if descriptor.size() > LARGEST {
            let message = format!("the config of {name} has {} bytes", descriptor.size());
            return Err(Failure::new(Kind::BadFormat, message));
        }
        let blob = self.proxy.skopeo.get_blob(opened, descriptor.digest(), descriptor.size());
        let (reader, verdict) = self.request(name, "config", blob).await?;
        let mut raw = Vec::new();
        // The proxy closes the pipe when it is asked for its verdict, not before.
        let both = async {
            let mut limited = reader.take(LARGEST + 1);
            let (read, verdict) = futures_util::future::join(limited.read_to_end(&mut raw), verdict).await;
            verdict.and_then(|()| read.map_err(ProxyError::from))
        };
        self.request(name, "config", both).await?;
        let actual = sha256(&raw);
        if actual != expected {
            let message = format!("the config of {name} has the digest {actual}, not {expected}");
            return Err(Failure::new(Kind::BadDigest, message));
        }
        Ok(raw)
    }

    /// The manifest in OCI's form, and the digest of what the registry sent. That digest is skopeo's word: it checks
    /// manifests that are named by digest, by us or by an index, and may convert them, so that the bytes here need
    /// not hash to it.
    async fn raw_manifest(&self, name: &str, opened: &OpenedImage) -> Result<(String, Vec<u8>), Failure> {
        self.request(name, "manifest", self.proxy.skopeo.fetch_manifest_raw_oci(opened)).await
    }

    async fn request<T>(
        &self,
        name: &str,
        what: &str,
        call: impl Future<Output = Result<T, ProxyError>>,
    ) -> Result<T, Failure> {
        let patience = self.source.patience();
        match tokio::time::timeout(patience, call).await {
            Ok(result) => result.map_err(|error| failure(name, what, &error)),
            Err(_) => {
                let message = format!("{name}: no answer about its {what} within {} s", patience.as_secs());
                Err(Failure::new(Kind::Network, message))
            }
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn failure(name: &str, what: &str, error: &ProxyError) -> Failure {
    let text = error.to_string();
    let verdict = classify(&text, error.is_retryable());
    let signature = verdict.kind == Kind::Policy && verdict.advice == Kind::Policy.advice();
    let message = match policy_path().filter(|_| signature) {
        Some(path) => format!("{name}: refused by the signature policy {}: {text}", path.display()),
        None => format!("{name}: fetching its {what}: {text}"),
    };
    verdict.failure(message)
}
