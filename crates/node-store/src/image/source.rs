//! The source of images: skopeo processes with the host's own registry configuration.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use containers_image_proxy::ImageProxyConfig;
use oci_spec::image::{ImageConfiguration, ImageManifest};

use super::policy::Enforcement;
use super::proxy::{Proxy, Reader};
use super::{Failure, Kind, PullSpec, ResolvedImage};

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

/// Where images come from. Each reader has a skopeo process of its own, which the next reader takes over.
pub struct Source {
    settings: ImageSettings,
    policy: Enforcement,
    idle: Mutex<Vec<Proxy>>,
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
        if let Some(missing) = settings.authfile.as_deref().filter(|path| !path.exists()) {
            let message = format!("the configured auth file {} does not exist", missing.display());
            return Err(Failure::new(Kind::Unauthorized, message));
        }
        let first = Proxy::start(config(settings)).await?;
        let version = tokio::process::Command::new("skopeo").arg("--version").output().await;
        let version = version.map_err(|error| Failure::new(Kind::Local, format!("cannot start skopeo: {error}")))?;
        let policy = Enforcement::of_version(&String::from_utf8_lossy(&version.stdout));
        Ok(Self { settings: settings.clone(), policy, idle: Mutex::new(vec![first]) })
    }

    /// Finds the image and pins it by digest. For a multi-architecture index, the digest is that of
    /// this machine's manifest in it. The signature policy is enforced here: by the proxy, or, where that is
    /// too old to do it, by refusing whatever needs a signature.
    pub async fn resolve(&self, spec: &PullSpec) -> Result<ResolvedImage, Failure> {
        let mut reader = self.reader().await?;
        let resolved = reader.resolve(spec).await?;
        reader.give_back();
        Ok(resolved)
    }

    /// The image's manifest and config, checked: digests, architecture, ostree labels.
    pub async fn manifest(&self, image: &ResolvedImage) -> Result<ImageDescription, Failure> {
        let (manifest, config) = self.any_manifest(image).await?;
        super::release::refuse_payload(&image.pinned, &config)?;
        let layout = super::layout(&image.pinned, &manifest, &config, super::machine_architecture())?;
        Ok(ImageDescription { manifest, config, layout })
    }

    /// The manifest and config of any image, checked against its digest.
    pub(super) async fn any_manifest(
        &self,
        image: &ResolvedImage,
    ) -> Result<(ImageManifest, ImageConfiguration), Failure> {
        let mut reader = self.reader().await?;
        let described = reader.manifest(image).await?;
        reader.give_back();
        Ok(described)
    }

    /// Lends a skopeo process to one reader, starting it if none is idle.
    pub async fn reader(&self) -> Result<Reader<'_>, Failure> {
        let idle = self.idle().pop();
        let proxy = match idle {
            Some(proxy) => proxy,
            None => Proxy::start(config(&self.settings)).await?,
        };
        Ok(Reader { source: self, proxy })
    }

    /// Keeps a proxy for the next reader.
    pub(super) fn take_back(&self, proxy: Proxy) {
        self.idle().push(proxy);
    }

    /// Refuses an image that the signature policy does not accept and skopeo would.
    pub(super) fn check_policy(&self, name: &str) -> Result<(), Failure> {
        self.policy.check(name)
    }

    /// How long a registry may stay silent.
    pub(super) fn patience(&self) -> Duration {
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
    async fn a_configured_auth_file_that_is_missing_is_said() {
        let settings = ImageSettings { authfile: Some("/nonexistent/auth".into()), ..ImageSettings::default() };
        let failure = Source::open(&settings).await.err().unwrap();
        assert_eq!(failure.kind, Kind::Unauthorized);
        assert!(failure.message.contains("/nonexistent/auth"));
    }
}
