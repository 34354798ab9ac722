//! The skopeo processes, with the host's registry configuration.
//!
//! After a request to finish a layer, the proxy answers no other request before the last byte of that layer has arrived.
//! Each reader has a separate process, so a registry that stalls one layer delays only the reader of that layer.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containers_image_proxy::{ImageProxy, ImageProxyConfig, OpenedImage};

use super::policy::Enforcement;
use super::{Failure, Kind, PullSpec};
use support::command::Program;
use support::lock;

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

/// Time limit for skopeo to print its version.
const VERSION: Duration = Duration::from_secs(30);

/// A running skopeo process and the image that it has open.
pub(super) struct Proxy {
    pub(super) skopeo: ImageProxy,
    pub(super) opened: Option<(PullSpec, Arc<OpenedImage>)>,
    _parent: Parent,
}

/// Keeps the thread that started skopeo. The kernel ends skopeo together with that thread (PR_SET_PDEATHSIG in prctl(2)).
/// Without this, a skopeo that waits for a silent registry would not notice that its reader has ended.
struct Parent(#[allow(dead_code)] mpsc::Sender<()>);

impl Proxy {
    async fn start(config: ImageProxyConfig) -> Result<Self, Failure> {
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

/// The settings of skopeo, and its processes without a reader.
pub(super) struct Pool {
    settings: ImageSettings,
    policy: Enforcement,
    idle: Mutex<Vec<Proxy>>,
}

impl Pool {
    /// Starts a first process.
    ///
    /// # Errors
    /// skopeo is missing or too old, or the configured auth file does not exist.
    pub(super) async fn open(settings: &ImageSettings) -> Result<Self, Failure> {
        if let Some(missing) = settings.authfile.as_deref().filter(|path| !path.exists()) {
            let message = format!("cannot use the configured auth file {}: it does not exist", missing.display());
            return Err(Failure::new(Kind::Unauthorized, message));
        }
        let first = Proxy::start(config(settings)).await?;
        let version = Program::new(&["skopeo", "--version"], VERSION).end().await;
        let version = version.map_err(|error| Failure::new(Kind::Local, format!("{error:#}")))?;
        let policy = Enforcement::of_version(&String::from_utf8_lossy(&version.stdout));
        Ok(Self { settings: settings.clone(), policy, idle: Mutex::new(vec![first]) })
    }

    /// Returns an idle process, or a new one.
    pub(super) async fn proxy(&self) -> Result<Proxy, Failure> {
        let idle = lock(&self.idle).pop();
        match idle {
            Some(proxy) => Ok(proxy),
            None => Proxy::start(config(&self.settings)).await,
        }
    }

    /// Keeps a process for the next reader.
    pub(super) fn keep(&self, proxy: Proxy) {
        lock(&self.idle).push(proxy);
    }

    /// Refuses an image that the signature policy does not accept, if skopeo is too old to do so.
    pub(super) fn check_policy(&self, image: &PullSpec) -> Result<(), Failure> {
        self.policy.check(image)
    }

    /// Returns the limit of the time without data from the registry.
    pub(super) fn idle_timeout(&self) -> Duration {
        self.settings.idle_timeout.unwrap_or(Duration::from_secs(60))
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
        let failure = Pool::open(&settings).await.err().unwrap();
        assert_eq!(failure.kind, Kind::Unauthorized);
        assert!(failure.message.contains("/nonexistent/auth"));
    }
}
