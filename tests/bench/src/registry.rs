//! A real registry (docker-registry) on loopback.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::proc::run;

/// A running registry; stopped when dropped.
pub struct Registry {
    /// `HOST:PORT`.
    pub address: String,
    child: Child,
}

impl Registry {
    /// Starts one that serves what is in `storage`, with its configuration in `work`.
    ///
    /// # Errors
    /// When docker-registry is not installed or does not answer within 20 seconds.
    pub fn start(storage: &Path, work: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let config = work.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\", secret: benchmark}}\n",
            storage.display()
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().context("starting docker-registry (`make deps` installs it)")?;
        let registry = Self { address, child };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&registry.address).is_err() {
            ensure!(Instant::now() < deadline, "docker-registry does not answer on {}", registry.address);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// Pushes an OCI layout, blobs as they are; the digest of the manifest.
    pub fn push(&self, layout: &Path, name: &str) -> Result<String> {
        self.copy(layout, name, &["--preserve-digests"])
    }

    /// The same, all layers compressed with zstd.
    pub fn push_recompressed(&self, layout: &Path, name: &str) -> Result<String> {
        self.copy(layout, name, &["--dest-compress-format=zstd"])
    }

    fn copy(&self, layout: &Path, name: &str, how: &[&str]) -> Result<String> {
        let digest = tempfile::NamedTempFile::new()?;
        let source = format!("oci:{}", layout.display());
        let target = format!("docker://{}/{name}", self.address);
        let file = digest.path().to_str().context("the temporary directory's name is not UTF-8")?;
        let args = ["copy", "-q", "--insecure-policy", "--dest-tls-verify=false", "--digestfile", file];
        run("skopeo", args.iter().chain(how).chain([&source.as_str(), &target.as_str()]))?;
        Ok(fs::read_to_string(digest.path())?.trim().to_owned())
    }

    /// Digests and sizes of an image's layers.
    pub fn layers(&self, name: &str) -> Result<Vec<(String, u64)>> {
        let spec = format!("docker://{}/{name}", self.address);
        let manifest: Value = serde_json::from_str(&run("skopeo", ["inspect", "--raw", "--tls-verify=false", &spec])?)?;
        let layers = manifest["layers"].as_array().context("a manifest without layers")?;
        let layer = |layer: &Value| Some((layer["digest"].as_str()?.to_owned(), layer["size"].as_u64()?));
        layers.iter().map(layer).collect::<Option<_>>().context("a malformed descriptor of a layer")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
