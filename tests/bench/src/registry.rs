//! A real registry (docker-registry) on loopback.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

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
        let digest = tempfile::NamedTempFile::new()?;
        let source = format!("oci:{}", layout.display());
        let target = format!("docker://{}/{name}", self.address);
        let file = digest.path().to_str().context("the temporary directory's name is not UTF-8")?;
        let args = ["copy", "-q", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false"];
        run("skopeo", args.into_iter().chain(["--digestfile", file, &source, &target]))?;
        Ok(fs::read_to_string(digest.path())?.trim().to_owned())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
