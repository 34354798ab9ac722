//! Reads manifests, configs and layers of images through one skopeo process.

use std::sync::Arc;
use std::time::Duration;

use containers_image_proxy::{Error as ProxyError, OpenedImage};
use futures_util::FutureExt;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};
use tokio::io::AsyncReadExt;

use super::layout::compression;
use super::policy::policy_path;
use super::pool::{Pool, Proxy};
use super::{Compression, Digest, Failure, Kind, Layer, LayerStream, PullSpec, ResolvedImage, classify};

/// Time limit for opening an image on this machine. skopeo unpacks an archive first, perhaps from slow virtual media.
const UNPACK: Duration = Duration::from_secs(30 * 60);

/// A reader with its skopeo process. Dropping it, for example after a failure, ends the process.
pub struct Reader<'a> {
    pool: &'a Pool,
    proxy: Proxy,
}

impl<'a> Reader<'a> {
    pub(super) async fn of(pool: &'a Pool) -> Result<Self, Failure> {
        Ok(Self { proxy: pool.proxy().await?, pool })
    }

    /// Keeps the process for the next reader. Call this only after success, because after a failure the process may be in
    /// any state.
    pub fn give_back(self) {
        self.pool.keep(self.proxy);
    }

    /// Starts to fetch a layer.
    pub async fn layer(&mut self, image: &ResolvedImage, layer: &Layer) -> Result<LayerStream<'_>, Failure> {
        let name = format!("{} layer {} ({})", image.pinned, layer.index, layer.digest());
        let opened = self.opened(image).await?;
        // With the raw variant of newer proxies the agent would have to compute the digest. In skopeo, another core
        // computes it.
        let blob = self.proxy.skopeo.get_blob(&opened, layer.descriptor.digest(), layer.size());
        let (reader, verdict) = self.request(&name, blob).await.map_err(|failure| image.pinned.adapt(failure))?;
        let stream_name = name.clone();
        let verdict = verdict.map(move |result| result.map_err(|error| failure(&name, &error))).boxed();
        Ok(LayerStream {
            name: stream_name,
            spec: image.pinned.clone(),
            reader: Box::new(reader),
            verdict,
            size: layer.size(),
            idle: self.pool.idle_timeout(),
            total: 0,
            asked: false,
            answered: false,
            wrong: None,
        })
    }

    /// Opens the image that `spec` names, and pins it by digest.
    pub(super) async fn resolve(&mut self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let opened = self.open(spec).await?;
        let (digest, _) = self.raw_manifest(spec, &opened).await?;
        if let (PullSpec::Local(_), Some(expected)) = (spec, spec.digest().filter(|expected| *expected != digest)) {
            let message = format!("the manifest of {} has the digest {digest}: expected {expected}", spec.reference());
            return Err(spec.adapt(Failure::new(Kind::BadDigest, message)));
        }
        let pinned = spec.pinned(digest);
        self.proxy.opened = Some((pinned.clone(), opened));
        Ok(ResolvedImage { requested: spec.clone(), pinned, digest })
    }

    /// Returns the manifest and config of an image, compared with its digest.
    pub(super) async fn manifest(
        &mut self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageConfiguration), Failure> {
        let spec = &image.pinned;
        let opened = self.opened(image).await?;
        let (digest, raw) = self.raw_manifest(spec, &opened).await?;
        if digest != image.digest {
            let message = format!("the source has the manifest {digest} instead of {spec}");
            return Err(spec.adapt(Failure::new(Kind::BadDigest, message)));
        }
        let manifest: ImageManifest = serde_json::from_slice(&raw)
            .map_err(|error| Failure::new(Kind::BadFormat, format!("the manifest of {spec} is malformed: {error}")))?;
        let converted = Digest::of(&raw) != digest;
        let raw = self.config(spec, &opened, &manifest, converted).await.map_err(|failure| spec.adapt(failure))?;
        let config: ImageConfiguration = serde_json::from_slice(&raw)
            .map_err(|error| Failure::new(Kind::BadFormat, format!("the config of {spec} is malformed: {error}")))?;
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

    /// Opens the image by the name that the operator wrote, after the policy refused it by digest. Signatures and scopes
    /// of the policy may be for a tag or an index, and not for one manifest. If the name no longer leads to the pinned
    /// manifest, returns the refusal.
    async fn open_as_requested(&self, image: &ResolvedImage, refused: Failure) -> Result<Arc<OpenedImage>, Failure> {
        let opened = match self.open(&image.requested).await {
            Ok(opened) => opened,
            Err(failure) if failure.class.may_pass() => return Err(failure),
            Err(_) => return Err(refused),
        };
        let (digest, _) = self.raw_manifest(&image.requested, &opened).await?;
        if digest == image.digest { Ok(opened) } else { Err(refused) }
    }

    async fn open(&self, spec: &PullSpec) -> Result<Arc<OpenedImage>, Failure> {
        spec.check_path()?;
        self.pool.check_policy(spec)?;
        let limit = match spec {
            PullSpec::Registry(_) => self.pool.idle_timeout(),
            PullSpec::Local(_) => UNPACK,
        };
        let opened =
            self.request_within(limit, &spec.to_string(), self.proxy.skopeo.open_image(&spec.reference())).await;
        opened.map(Arc::new).map_err(|failure| spec.adapt(failure))
    }

    /// Returns the manifest with the layers as the source provides them. An image store keeps layers uncompressed, and has
    /// no blobs with the digests in the manifest.
    pub(super) async fn provided(
        &mut self,
        image: &ResolvedImage,
        manifest: &ImageManifest,
    ) -> Result<ImageManifest, Failure> {
        let mut provided = manifest.clone();
        let spec = &image.pinned;
        let uncompressed = |layer: &Descriptor| compression(layer.media_type()) == Some(Compression::None);
        if !spec.is_store() || manifest.layers().iter().all(uncompressed) {
            return Ok(provided);
        }
        let opened = self.opened(image).await?;
        let subject = format!("the layers of {spec}");
        let layers = self.request(&subject, self.proxy.skopeo.get_layer_info(&opened)).await;
        let layers = layers.map_err(|failure| spec.adapt(failure))?.ok_or_else(|| Failure {
            advice: "install skopeo 1.13 or later, or copy the image to a directory (skopeo copy … oci:DIR:TAG)",
            ..Failure::new(Kind::Local, format!("cannot read {subject}: this skopeo does not list them"))
        })?;
        if layers.len() != provided.layers().len() {
            let (found, expected) = (layers.len(), provided.layers().len());
            let message = format!("{subject} are incomplete: the store has {found} of {expected}");
            return Err(spec.adapt(Failure::new(Kind::BadFormat, message)));
        }
        for (descriptor, layer) in provided.layers_mut().iter_mut().zip(layers) {
            descriptor.set_digest(layer.digest);
            descriptor.set_size(layer.size);
            descriptor.set_media_type(layer.media_type);
        }
        Ok(provided)
    }

    /// Returns the bytes of the config with the digest in the manifest.
    ///
    /// The config is a normal blob unless skopeo converted the manifest from docker's form. Then the config was converted,
    /// too: it is in no registry, and only the proxy's "full config" returns it.
    async fn config(
        &self,
        name: &PullSpec,
        opened: &OpenedImage,
        manifest: &ImageManifest,
        converted: bool,
    ) -> Result<Vec<u8>, Failure> {
        const LARGEST: u64 = 8 << 20;
        let subject = format!("the config of {name}");
        let descriptor = manifest.config();
        let expected = descriptor.digest().to_string();
        if converted {
            let full = self.request(&subject, self.proxy.skopeo.fetch_config_raw(opened)).await?;
            if Digest::of(&full).to_string() == expected {
                return Ok(full);
            }
        }
        if descriptor.size() > LARGEST {
            let message = format!("{subject} has {} bytes: expected at most {LARGEST}", descriptor.size());
            return Err(Failure::new(Kind::BadFormat, message));
        }
        let blob = self.proxy.skopeo.get_blob(opened, descriptor.digest(), descriptor.size());
        let (reader, verdict) = self.request(&subject, blob).await?;
        let mut raw = Vec::new();
        // The proxy closes the pipe only after the request to finish it.
        let both = async {
            let mut limited = reader.take(LARGEST + 1);
            let (read, verdict) = futures_util::future::join(limited.read_to_end(&mut raw), verdict).await;
            verdict.and_then(|()| read.map_err(ProxyError::from))
        };
        self.request(&subject, both).await?;
        let actual = Digest::of(&raw).to_string();
        if actual != expected {
            let message = format!("{subject} has the digest {actual}: expected {expected}");
            return Err(Failure::new(Kind::BadDigest, message));
        }
        Ok(raw)
    }

    /// Returns the manifest in OCI's form, and the digest of the manifest that the registry sent. skopeo computes that
    /// digest and compares it with a digest in the name or in an index. It may then convert the manifest, so the returned
    /// bytes can have another digest.
    async fn raw_manifest(&self, spec: &PullSpec, opened: &OpenedImage) -> Result<(Digest, Vec<u8>), Failure> {
        let subject = format!("the manifest of {spec}");
        let answer = self.request(&subject, self.proxy.skopeo.fetch_manifest_raw_oci(opened)).await;
        let (digest, raw) = answer.map_err(|failure| spec.adapt(failure))?;
        let digest = digest.parse().map_err(|cause| {
            Failure::new(Kind::BadDigest, format!("cannot use {subject}: {cause}; it is {digest:.80}"))
        })?;
        Ok((digest, raw))
    }

    async fn request<T>(&self, subject: &str, call: impl Future<Output = Result<T, ProxyError>>) -> Result<T, Failure> {
        self.request_within(self.pool.idle_timeout(), subject, call).await
    }

    async fn request_within<T>(
        &self,
        timeout: Duration,
        subject: &str,
        call: impl Future<Output = Result<T, ProxyError>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(timeout, call).await {
            Ok(result) => result.map_err(|error| failure(subject, &error)),
            Err(_) => {
                let message = format!("cannot fetch {subject}: no answer within {} s", timeout.as_secs());
                Err(Failure::new(Kind::Network, message))
            }
        }
    }
}

fn failure(subject: &str, error: &ProxyError) -> Failure {
    let failure = classify(&error.to_string(), error.is_retryable());
    let signature = failure.kind == Kind::Policy && failure.advice == Kind::Policy.advice();
    let text = &failure.message;
    let message = match policy_path().filter(|_| signature) {
        Some(path) => format!("the signature policy {} refuses {subject}: {text}", path.display()),
        None => format!("cannot fetch {subject}: {text}"),
    };
    Failure { message, ..failure }
}
