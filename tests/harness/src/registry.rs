//! A real registry (docker-registry) on the loopback interface, started and stopped at will.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::images::Image;
use crate::proc::{bound, end, free_port, log_to, succeed, wait_for};

/// A registry, its storage and its login.
pub struct Registry {
    /// Its port on 127.0.0.1.
    pub port: u16,
    work: PathBuf,
    netns: Option<u32>,
    login: Option<(String, String)>,
    child: Option<Child>,
}

impl Registry {
    /// Start one. `netns`: a process in whose network namespace it listens (loopback there). `login`: user and password
    /// that it asks for.
    pub fn start(storage: &Path, work: &Path, netns: Option<u32>, login: Option<(&str, &str)>) -> Result<Self> {
        let login = login.map(|(user, password)| (user.to_string(), password.to_string()));
        // In a namespace of its own any port is free.
        let port = match netns {
            Some(_) => 5000 + u16::from(login.is_some()),
            None => free_port()?,
        };
        let work = work.join(format!("registry-{port}"));
        fs::create_dir_all(&work)?;
        let mut auth = String::new();
        if let Some((user, password)) = &login {
            let line = succeed(Command::new("htpasswd").args(["-Bbn", user, password]))?;
            fs::write(work.join("htpasswd"), line.stdout)?;
            auth = format!("auth: {{htpasswd: {{realm: testbed, path: {}}}}}\n", work.join("htpasswd").display());
        }
        let config = format!(
            "version: 0.1\nlog: {{level: warn, accesslog: {{disabled: false}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, maintenance: {{readonly: {{enabled: true}}}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\", secret: testbed}}\n{auth}",
            storage.display()
        );
        fs::write(work.join("config.yml"), config)?;
        let mut registry = Registry { port, work, netns, login, child: None };
        registry.resume()?;
        Ok(registry)
    }

    /// Start it (again), on the same port.
    pub fn resume(&mut self) -> Result<()> {
        self.stop();
        let mut command = self.in_namespace(bound, "docker-registry");
        command.arg("serve").arg(self.work.join("config.yml"));
        log_to(&mut command, &self.work.join("log"))?;
        self.child = Some(command.spawn().context("starting docker-registry")?);
        wait_for("the registry's answer", Duration::from_secs(180), || Ok(self.answers()))
    }

    /// Stop it: connections are refused from now on.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end(&mut child);
        }
    }

    /// Returns the log of its requests, one on each line.
    pub fn log(&self) -> String {
        fs::read_to_string(self.work.join("log")).unwrap_or_default()
    }

    /// Returns the bytes that it served of a blob since it was last started.
    pub fn served(&self, digest: &str) -> u64 {
        let get = format!("/blobs/{digest} HTTP/1.1\" 200 ");
        let log = self.log();
        let sizes = log.lines().filter(|line| line.contains("\"GET ")).filter_map(|line| line.split_once(&get));
        sizes.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Returns the bytes that it served of an image's layers since it was last started, and the size of these layers. `storage`
    /// is that of the registry.
    pub fn served_layers(&self, storage: &Path, image: &Image) -> Result<(u64, u64)> {
        let (served, sizes): (Vec<_>, Vec<_>) = self.served_of_each(storage, image)?.into_iter().unzip();
        Ok((served.iter().sum(), sizes.iter().sum()))
    }

    /// Returns the same of each layer.
    pub fn served_of_each(&self, storage: &Path, image: &Image) -> Result<Vec<(u64, u64)>> {
        let hex = image.digest.trim_start_matches("sha256:");
        let manifest = fs::read(storage.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2])))?;
        let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
        let layers = manifest["layers"].as_array().context("a manifest without layers")?;
        Ok(layers
            .iter()
            .filter_map(|layer| Some((self.served(layer["digest"].as_str()?), layer["size"].as_u64()?)))
            .collect())
    }

    fn answers(&self) -> bool {
        let mut curl = self.in_namespace(Command::new, "curl");
        curl.args(["-fsS", "--max-time", "2", "-o", "/dev/null"]);
        if let Some((user, password)) = &self.login {
            curl.arg("-u").arg(format!("{user}:{password}"));
        }
        curl.arg(format!("http://127.0.0.1:{}/v2/", self.port));
        curl.output().is_ok_and(|o| o.status.success())
    }

    fn in_namespace(&self, start: impl FnOnce(&'static str) -> Command, program: &'static str) -> Command {
        match self.netns {
            Some(pid) => {
                let mut command = start("nsenter");
                command.arg("--net").arg(format!("--target={pid}")).arg("--").arg(program);
                command
            }
            None => start(program),
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The mirror's registries.conf: a registry that exists only by its mirror, as disconnected clusters have it.
pub fn registries_conf(host: &str, port: u16) -> String {
    format!(
        "[[registry]]\nprefix = \"registry.example.test\"\nlocation = \"registry.example.test\"\n\
         [[registry.mirror]]\nlocation = \"{host}:{port}\"\ninsecure = true\n"
    )
}

/// An auth file with one login.
pub fn auth_file(registry: &str, user: &str, password: &str) -> String {
    format!(
        "{{\"auths\": {{\"{registry}\": {{\"auth\": \"{}\"}}}}}}\n",
        base64(format!("{user}:{password}").as_bytes())
    )
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i)) as usize & 63] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_pads() {
        assert_eq!(super::base64(b"a:b"), "YTpi");
        assert_eq!(super::base64(b"u:pw"), "dTpwdw==");
        assert_eq!(super::base64(b"us:pw"), "dXM6cHc=");
    }
}
