//! A real registry on loopback, and an HTTP server that gives one bad answer to everything.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::fixture::run;

/// docker-registry, stopped when dropped.
pub struct Registry {
    pub address: String,
    storage: PathBuf,
    child: Child,
    credentials: Option<&'static str>,
}

impl Registry {
    /// Starts one that keeps its blobs below `dir`; with credentials (`user:password`) it wants them.
    pub fn start(dir: &Path, credentials: Option<&'static str>) -> Self {
        Self::serve(dir.join("storage"), dir, credentials)
    }

    /// Starts one that serves what is in `storage`, with its own files in `dir`.
    pub fn serve(storage: PathBuf, dir: &Path, credentials: Option<&'static str>) -> Self {
        let address = free_address();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n",
            storage.display()
        );
        if let Some(credentials) = credentials {
            let (user, password) = credentials.split_once(':').unwrap();
            let file = dir.join("htpasswd");
            run("htpasswd", &["-Bbc", file.to_str().unwrap(), user, password]);
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display()));
        }
        let path = dir.join("config.yml");
        fs::write(&path, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { address, storage, child, credentials };
        let deadline = Instant::now() + Duration::from_secs(120);
        while TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    /// Pushes an OCI layout blob by blob; the pull spec.
    pub fn push(&self, layout: &Path, name: &str) -> String {
        self.copy(layout, name, &["--preserve-digests"])
    }

    /// Puts an OCI layout of one image into the storage of the registry, because skopeo needs about a second to push one
    /// layer. Returns the pull spec.
    pub fn place(&self, layout: &Path, repository: &str) -> String {
        let root = self.storage.join("docker/registry/v2");
        let write = |path: PathBuf, content: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        let link = |dir: &str, hex: &str| {
            write(root.join("repositories").join(repository).join(dir).join("link"), &format!("sha256:{hex}"));
        };
        for blob in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let hex = blob.unwrap().file_name().into_string().unwrap();
            let data = self.blob(&format!("sha256:{hex}"));
            fs::create_dir_all(data.parent().unwrap()).unwrap();
            fs::hard_link(layout.join("blobs/sha256").join(&hex), data).unwrap();
            link(&format!("_layers/sha256/{hex}"), &hex);
        }
        let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let hex = digest.strip_prefix("sha256:").unwrap();
        for dir in ["revisions", "tags/1/index"].map(|dir| format!("_manifests/{dir}/sha256/{hex}")) {
            link(&dir, hex);
        }
        link("_manifests/tags/1/current", hex);
        format!("{}/{repository}:1", self.address)
    }

    /// Pushes an OCI layout in docker's form; the pull spec.
    pub fn push_docker(&self, layout: &Path, name: &str) -> String {
        self.copy(layout, name, &["--format=v2s2"])
    }

    fn copy(&self, layout: &Path, name: &str, how: &[&str]) -> String {
        let spec = format!("{}/{name}", self.address);
        let (source, target) = (format!("oci:{}", layout.display()), format!("docker://{spec}"));
        let mut args = vec!["copy", "-q", "--all", "--insecure-policy", "--dest-tls-verify=false"];
        args.extend(how);
        if let Some(credentials) = self.credentials {
            args.extend(["--dest-creds", credentials]);
        }
        args.extend([source.as_str(), target.as_str()]);
        run("skopeo", &args);
        spec
    }

    /// The file that holds a blob (`sha256:…`), to be spoiled.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.storage.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns an address without a listener. Its port is below those that the kernel gives to connections and to listeners
/// without a port, so that no other test gets it.
pub fn free_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let of = |number: u32| 10_000 + (std::process::id() * 61 + number) % 20_000;
    let mut addresses = std::iter::repeat_with(|| format!("127.0.0.1:{}", of(NEXT.fetch_add(1, Ordering::Relaxed))));
    addresses.find(|address| TcpListener::bind(address).is_ok()).unwrap()
}

/// Answers every request with `response` and closes; its address. Lives as long as the test program.
pub fn always(response: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(response.as_bytes());
        }
    });
    address
}
