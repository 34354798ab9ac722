//! The source of images: skopeo processes with the host's registry configuration.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use containers_image_proxy::ImageProxyConfig;
use oci_spec::image::{ImageConfiguration, ImageManifest};

use super::policy::Enforcement;
use super::proxy::{Proxy, Reader};
use super::{Failure, Kind, PullSpec, ResolvedImage};

/// Default auth file. The installer writes the pull secret to it.
const DEFAULT_AUTHFILE: &str = "/root/.docker/config.json";

/// Settings of skopeo. It reads all others (mirrors, insecure or blocked registries, trust, signature policy) from the
/// host's configuration, and proxies from the environment.
#[derive(Debug, Clone, Default)]
pub struct ImageSettings {
    /// File with credentials. If unset, `/root/.docker/config.json` if it exists, otherwise skopeo's defaults.
    pub authfile: Option<PathBuf>,
    /// True to accept registries without verified TLS, for tests and labs. The host's `registries.conf` can do this for
    /// a single registry.
    pub insecure: bool,
    /// Directory with additional CA certificates, as for `skopeo --cert-dir`.
    pub certificate_directory: Option<PathBuf>,
    /// Time without data from the registry after which an attempt fails, during a request or in a layer. If unset, one
    /// minute.
    pub idle_timeout: Option<Duration>,
}

/// The source of images. Each reader uses a separate skopeo process, and the next reader reuses it.
pub struct Source {
    settings: ImageSettings,
    policy: Enforcement,
    idle: Mutex<Vec<Proxy>>,
}

/// The manifest, the config and the layout of an image, all verified by the image's digest.
#[derive(Debug, Clone)]
pub struct ImageDescription {
    /// Manifest in OCI's form.
    pub manifest: ImageManifest,
    /// Config of the image.
    pub config: ImageConfiguration,
    /// Layers by purpose.
    pub layout: super::Layout,
}

impl Source {
    /// Starts a skopeo process.
    ///
    /// # Errors
    /// skopeo is missing or too old, or the configured auth file does not exist.
    pub async fn open(settings: &ImageSettings) -> Result<Self, Failure> {
        if let Some(missing) = settings.authfile.as_deref().filter(|path| !path.exists()) {
            let message = format!("cannot use the configured auth file {}: it does not exist", missing.display());
            return Err(Failure::new(Kind::Unauthorized, message));
        }
        let first = Proxy::start(config(settings)).await?;
        let version = tokio::process::Command::new("skopeo").arg("--version").output().await;
        let version = version.map_err(|error| Failure::new(Kind::Local, format!("cannot run skopeo: {error}")))?;
        let policy = Enforcement::of_version(&String::from_utf8_lossy(&version.stdout));
        Ok(Self { settings: settings.clone(), policy, idle: Mutex::new(vec![first]) })
    }

    /// Pins an image by digest. For a multi-architecture index, this is the digest of this machine's manifest. skopeo
    /// enforces the signature policy here; if it is too old, images that need a signature are refused.
    pub async fn resolve(&self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let mut reader = self.reader().await?;
        let resolved = reader.resolve(spec).await?;
        reader.give_back();
        Ok(resolved)
    }

    /// Returns the manifest, config and layout of a node image, after a check of digests, architecture and ostree labels.
    pub async fn manifest(&self, image: &ResolvedImage) -> Result<ImageDescription, Failure> {
        let (manifest, config) = self.any_manifest(image).await?;
        super::release::refuse_payload(&image.pinned, &config)?;
        let layout = super::layout(&image.pinned, &manifest, &config, super::machine_architecture())?;
        Ok(ImageDescription { manifest, config, layout })
    }

    /// Returns the manifest and config of any image, after a check of its digest.
    pub(super) async fn any_manifest(
        &self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageConfiguration), Failure> {
        let mut reader = self.reader().await?;
        let described = reader.manifest(image).await?;
        reader.give_back();
        Ok(described)
    }

    /// Returns a reader with an idle skopeo process, or with a new one.
    pub async fn reader(&self) -> Result<Reader<'_>, Failure> {
        let idle = self.idle().pop();
        let proxy = match idle {
            Some(proxy) => proxy,
            None => Proxy::start(config(&self.settings)).await?,
        };
        Ok(Reader { source: self, proxy })
    }

    /// Keeps a skopeo process for the next reader.
    pub(super) fn keep(&self, proxy: Proxy) {
        self.idle().push(proxy);
    }

    /// Refuses an image that the signature policy does not accept, if skopeo is too old to do so.
    pub(super) fn check_policy(&self, name: &str) -> Result<(), Failure> {
        self.policy.check(name)
    }

    /// Returns the limit of the time without data from the registry.
    pub(super) fn idle_timeout(&self) -> Duration {
        self.settings.idle_timeout.unwrap_or(Duration::from_secs(60))
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Proxy>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn config(settings: &ImageSettings) -> ImageProxyConfig {
    let mut config = ImageProxyConfig::default();
    config.authfile = choose_authfile(settings.authfile.as_deref(), Path::new(DEFAULT_AUTHFILE));
    config.certificate_directory = settings.certificate_directory.clone();
    config.insecure_skip_tls_verification = settings.insecure.then_some(true);
    config
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
    async fn a_missing_configured_auth_file_is_reported() {
        let settings = ImageSettings { authfile: Some("/nonexistent/auth".into()), ..ImageSettings::default() };
        let failure = Source::open(&settings).await.err().unwrap();
        assert_eq!(failure.kind, Kind::Unauthorized);
        assert!(failure.message.contains("/nonexistent/auth"));
    }
}
