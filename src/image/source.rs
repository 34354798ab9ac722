//! The image proxy: skopeo, driven over its socket, with the host's own registry configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use containers_image_proxy::{Error as ProxyError, ImageProxy, ImageProxyConfig, OpenedImage};
use futures_util::FutureExt;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tokio::sync::Mutex;

use super::classify::is_about_certificates;
use super::policy::{Enforcement, policy_path};
use super::{Class, Failure, Kind, Layer, LayerStream, PullSpec, ResolvedImage, classify};

/// The auth file of the field: the installer puts the pull secret there.
const DEFAULT_AUTHFILE: &str = "/root/.docker/config.json";

/// How the proxy is to be started. Everything else (mirrors, insecure or blocked registries, trust,
/// signature policy) is the host's configuration, which skopeo reads by itself; proxy variables pass
/// through the environment.
#[derive(Debug, Clone, Default)]
pub struct ImageSettings {
    /// Credentials; when unset, `/root/.docker/config.json` if it is there, else skopeo's own defaults.
    pub authfile: Option<PathBuf>,
    /// Talk to registries without verified TLS. For tests and labs; the host's `registries.conf` can
    /// say the same for one registry only.
    pub insecure: bool,
    /// Further CA certificates (a directory), as for `skopeo --cert-dir`.
    pub certificate_directory: Option<PathBuf>,
    /// How long a registry may stay silent, during a request or in the middle of a layer, before the
    /// attempt is given up; one minute when unset.
    pub idle_timeout: Option<Duration>,
}

/// A running proxy. After a failure it may be in any state: drop it and open another one.
pub struct Source {
    proxy: ImageProxy,
    idle: Duration,
    opened: Mutex<Option<(String, Arc<OpenedImage>)>>,
    activity: AtomicU64,
    policy: Enforcement,
}

/// The manifest, the config and the layers' purposes, all verified against the image's digest.
#[derive(Debug, Clone)]
pub struct ImageDescription {
    /// The manifest, in OCI's form.
    pub manifest: ImageManifest,
    /// The config.
    pub config: ImageConfiguration,
    /// What each layer is for.
    pub layout: super::Layout,
}

impl Source {
    /// Starts a proxy. Fails when skopeo is missing or too old.
    pub async fn open(settings: &ImageSettings) -> Result<Self, Failure> {
        let mut config = ImageProxyConfig::default();
        config.authfile = choose_authfile(settings.authfile.as_deref(), Path::new(DEFAULT_AUTHFILE));
        config.certificate_directory = settings.certificate_directory.clone();
        config.insecure_skip_tls_verification = settings.insecure.then_some(true);
        if let Some(missing) = settings.authfile.as_deref().filter(|path| !path.exists()) {
            let message = format!("the configured auth file {} does not exist", missing.display());
            return Err(Failure::new(Kind::Unauthorized, message));
        }
        let proxy = ImageProxy::new_with_config(config)
            .await
            .map_err(|error| Failure::new(Kind::Local, format!("starting skopeo: {error}")))?;
        let version = tokio::process::Command::new("skopeo").arg("--version").output().await;
        let version = version.map_err(|error| Failure::new(Kind::Local, format!("starting skopeo: {error}")))?;
        let policy = Enforcement::of_version(&String::from_utf8_lossy(&version.stdout));
        let idle = settings.idle_timeout.unwrap_or(Duration::from_secs(60));
        Ok(Self { proxy, idle, opened: Mutex::new(None), activity: AtomicU64::new(0), policy })
    }

    /// Finds the image and pins it by digest. For a multi-architecture index, the digest is that of
    /// this machine's manifest in it. The signature policy is enforced here: by the proxy, or, where that is
    /// too old to do it, by refusing whatever needs a signature.
    pub async fn resolve(&self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let requested = spec.to_string();
        let opened = self.open_image(&requested).await?;
        let (digest, _) = self.raw_manifest(&requested, &opened).await?;
        let pinned = spec.pinned(&digest);
        *self.opened.lock().await = Some((pinned.clone(), opened));
        Ok(ResolvedImage { requested, pinned, digest })
    }

    /// The image's manifest and config, checked: digests, architecture, ostree labels.
    pub async fn manifest(&self, image: &ResolvedImage) -> Result<ImageDescription, Failure> {
        let (manifest, config) = self.any_manifest(image).await?;
        let layout = super::layout(&image.pinned, &manifest, &config, super::machine_architecture())?;
        Ok(ImageDescription { manifest, config, layout })
    }

    /// The manifest and config of any image, checked against its digest.
    pub(super) async fn any_manifest(
        &self,
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

    /// Starts to fetch a layer.
    pub async fn layer<'a>(&'a self, image: &ResolvedImage, layer: &Layer) -> Result<LayerStream<'a>, Failure> {
        let name = format!("{} layer {} ({})", image.pinned, layer.index, layer.digest());
        let opened = self.opened(image).await?;
        // The raw variant of newer proxies leaves the digest to us; this one verifies it in skopeo,
        // in another process and so on another core.
        let blob = self.proxy.get_blob(&opened, layer.descriptor.digest(), layer.size());
        let (reader, verdict) = self.request(&name, "layer", blob).await?;
        let stream_name = name.clone();
        let verdict = verdict.map(move |result| result.map_err(|error| failure(&name, "layer", &error))).boxed();
        Ok(LayerStream {
            name: stream_name,
            reader: Box::new(reader),
            verdict,
            size: layer.size(),
            idle: self.idle,
            activity: &self.activity,
            total: 0,
            asked: false,
            answered: false,
            wrong: None,
        })
    }

    async fn opened(&self, image: &ResolvedImage) -> Result<Arc<OpenedImage>, Failure> {
        let mut cached = self.opened.lock().await;
        if let Some((pinned, opened)) = cached.as_ref()
            && *pinned == image.pinned
        {
            return Ok(opened.clone());
        }
        let opened = match self.open_image(&image.pinned).await {
            Err(refused) if refused.kind == Kind::Policy && image.requested != image.pinned => {
                self.open_as_requested(image, refused).await?
            }
            opened => opened?,
        };
        *cached = Some((image.pinned.clone(), opened.clone()));
        Ok(opened)
    }

    /// The image by the name that it was asked for. Signatures, and scopes of the policy, may be those of a
    /// tag or of an index, and say nothing about the one manifest in it. What the policy accepts under that
    /// name must be the pinned manifest still, or the refusal stands.
    async fn open_as_requested(&self, image: &ResolvedImage, refused: Failure) -> Result<Arc<OpenedImage>, Failure> {
        let opened = match self.open_image(&image.requested).await {
            Ok(opened) => opened,
            Err(failure) if failure.kind.class() == Class::Transient => return Err(failure),
            Err(_) => return Err(refused),
        };
        let (digest, _) = self.raw_manifest(&image.requested, &opened).await?;
        if digest == image.digest { Ok(opened) } else { Err(refused) }
    }

    async fn open_image(&self, name: &str) -> Result<Arc<OpenedImage>, Failure> {
        self.policy.check(name)?;
        let reference = format!("docker://{name}");
        self.request(name, "image", self.proxy.open_image(&reference)).await.map(Arc::new)
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
            let full = self.request(name, "config", self.proxy.fetch_config_raw(opened)).await?;
            if sha256(&full) == expected {
                return Ok(full);
            }
        }
        if descriptor.size() > LARGEST {
            let message = format!("the config of {name} has {} bytes", descriptor.size());
            return Err(Failure::new(Kind::BadFormat, message));
        }
        let blob = self.proxy.get_blob(opened, descriptor.digest(), descriptor.size());
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
        self.request(name, "manifest", self.proxy.fetch_manifest_raw_oci(opened)).await
    }

    async fn request<T>(
        &self,
        name: &str,
        what: &str,
        call: impl Future<Output = Result<T, ProxyError>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(self.idle, call).await {
            Ok(result) => result.map_err(|error| failure(name, what, &error)),
            Err(_) => {
                let message = format!("{name}: no answer about its {what} within {} s", self.idle.as_secs());
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
    let (mut kind, retry_after) = classify(&text);
    if error.is_retryable() && kind == Kind::Local {
        kind = Kind::Network;
    }
    let mut failure = Failure::new(kind, format!("{name}: fetching its {what}: {text}"));
    failure.retry_after = retry_after;
    if kind == Kind::Policy {
        if is_about_certificates(&text) {
            failure.advice = "check the registry's certificate, /etc/containers/certs.d and the machine's clock";
        } else if let Some(path) = policy_path() {
            failure.message = format!("{name}: refused by the signature policy {}: {text}", path.display());
        }
    }
    failure
}

fn choose_authfile(configured: Option<&Path>, default: &Path) -> Option<PathBuf> {
    let default = || (std::env::var_os("REGISTRY_AUTH_FILE").is_none() && default.exists()).then(|| default.to_owned());
    configured.map(Path::to_owned).or_else(default)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_default_auth_file_is_used_when_it_exists() {
        let temp = tempfile::tempdir().unwrap();
        let default = temp.path().join("config.json");
        assert_eq!(choose_authfile(None, &default), None);
        std::fs::write(&default, "{}").unwrap();
        assert_eq!(choose_authfile(None, &default), Some(default.clone()));
        assert_eq!(choose_authfile(Some(Path::new("/x")), &default), Some("/x".into()));
    }

    #[tokio::test]
    async fn a_configured_auth_file_that_is_missing_is_said() {
        let settings = ImageSettings { authfile: Some("/nonexistent/auth".into()), ..ImageSettings::default() };
        let failure = Source::open(&settings).await.err().unwrap();
        assert_eq!(failure.kind, Kind::Unauthorized);
        assert!(failure.message.contains("/nonexistent/auth"));
    }
}
