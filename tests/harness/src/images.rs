//! Images that the scripts in `tests/bed` build, and their paths.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::proc::succeed;

/// One image that the registry serves.
#[derive(Debug, Clone)]
pub struct Image {
    /// Repository, for example `cluster/node-a`.
    pub repo: String,
    /// Its tag.
    pub tag: String,
    /// Digest of its manifest.
    pub digest: String,
    /// The ostree commit in it, where the test bed knows it.
    pub commit: Option<String>,
}

impl Image {
    /// As a node's configuration names it: a registry that exists only through its mirror.
    pub fn by_digest(&self) -> String {
        format!("registry.example.test/{}@{}", self.repo, self.digest)
    }

    /// The same by tag.
    pub fn by_tag(&self) -> String {
        format!("registry.example.test/{}:{}", self.repo, self.tag)
    }
}

/// Tools that every machine needs.
#[derive(Debug, Clone)]
pub struct Tools {
    /// Program that starts the emulator.
    pub qemu: PathBuf,
    /// Private key whose public half guests accept.
    pub ssh_key: PathBuf,
}

/// One live bootimage and the node image that it becomes, without the rest of [`Images`].
#[derive(Debug)]
pub struct Pair {
    /// For its machine.
    pub tools: Tools,
    /// As [`Images::boot`], or as [`Images::disk`].
    pub boot: PathBuf,
    /// As [`Images::storage`].
    pub storage: PathBuf,
    /// The node image.
    pub image: Image,
}

/// Everything built.
#[derive(Debug)]
pub struct Images {
    /// For machines and containers.
    pub tools: Tools,
    /// Live bootimage: vmlinuz, initramfs.img, sysroot.squashfs, kargs, commit.
    pub boot: PathBuf,
    /// The same with the cluster's binaries in it.
    pub boot_binaries: PathBuf,
    /// Storage of the registry.
    pub storage: PathBuf,
    /// By name: node-a, node-b, plain, corrupt, ….
    pub by_name: HashMap<String, Image>,
}

/// The project's folder.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_path_buf()
}

/// A folder for one guest's console, journal and sockets, emptied.
pub fn work_dir(name: &str) -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project().join("target"), PathBuf::from);
    let dir = target.join("testbed").join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("emptying {}", dir.display()))?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

impl Images {
    /// Build what is missing; the scripts decide. Once per process.
    pub fn ensure() -> Result<&'static Images> {
        static IMAGES: OnceLock<Images> = OnceLock::new();
        if let Some(images) = IMAGES.get() {
            return Ok(images);
        }
        let images = Images::build()?;
        Ok(IMAGES.get_or_init(|| images))
    }

    fn build() -> Result<Images> {
        let script = project().join("tests/bed/build.sh");
        // Its progress goes to the terminal, its answer is JSON on standard output.
        let output = Command::new(&script)
            .arg("paths")
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("starting {}", script.display()))?;
        if !output.status.success() {
            bail!("{} paths: {}", script.display(), output.status);
        }
        let paths: Value = serde_json::from_slice(&output.stdout).context("reading the answer of build.sh paths")?;
        let path =
            |key: &str| paths[key].as_str().map(PathBuf::from).with_context(|| format!("build.sh paths: no {key:?}"));
        let registry = path("registry")?;
        let list: HashMap<String, Value> = serde_json::from_slice(&fs::read(registry.join("images.json"))?)?;
        let by_name = list.into_iter().map(|(name, v)| {
            let text = |key: &str| v[key].as_str().map(str::to_string);
            let image = Image {
                repo: text("repo").unwrap_or_default(),
                tag: text("tag").unwrap_or_default(),
                digest: text("digest").unwrap_or_default(),
                commit: text("commit"),
            };
            (name, image)
        });
        Ok(Images {
            tools: Tools { qemu: path("qemu")?, ssh_key: path("ssh_key")? },
            boot: path("boot")?,
            boot_binaries: path("boot_binaries")?,
            storage: registry.join("storage"),
            by_name: by_name.collect(),
        })
    }

    /// An installed system, built if need be: vmlinuz, initramfs.img, disk.img, kargs, commit. Few tests
    /// need it, so it is not among the fields.
    pub fn disk(&self) -> Result<PathBuf> {
        build("disk")
    }

    /// Returns the directory of the same without any file of the agent.
    pub fn stock_disk(&self) -> Result<PathBuf> {
        build("disk-stock")
    }

    /// A live bootimage with a container runtime, likewise.
    pub fn boot_runtime(&self) -> Result<PathBuf> {
        build("runtime")
    }

    /// Returns the directory of a live bootimage without any file of the agent, likewise.
    pub fn stock(&self) -> Result<PathBuf> {
        build("stock")
    }

    /// Returns the directory of the same with the cluster's binaries, likewise.
    pub fn stock_binaries(&self) -> Result<PathBuf> {
        build("stock-binaries")
    }

    /// Returns an initramfs of the base system that dracut made with the agent's module, likewise.
    pub fn initramfs(&self) -> Result<PathBuf> {
        Ok(build("initramfs")?.join("initramfs.img"))
    }

    /// Returns an initramfs of the base system with Debian's Ignition, likewise.
    pub fn initramfs_ignition(&self) -> Result<PathBuf> {
        Ok(build("initramfs-ignition")?.join("initramfs.img"))
    }

    /// Returns the directory of an old kernel: vmlinuz, and modules.img for the initramfs of another kernel; likewise.
    pub fn old_kernel(&self) -> Result<PathBuf> {
        build("kernel")
    }

    /// A live bootimage with podman, and the directory of a newer one, for a layer upon node image a; likewise.
    pub fn podman(&self) -> Result<(PathBuf, PathBuf)> {
        two_paths("podman", ["boot", "layer"])
    }

    /// A live bootimage with NetworkManager, dbus-broker, polkit and chrony, and the directory of newer ones; likewise.
    pub fn network(&self) -> Result<(PathBuf, PathBuf)> {
        two_paths("network", ["boot", "layer"])
    }

    /// Returns the directory of a skopeo that enforces signature policies, likewise.
    pub fn skopeo() -> Result<PathBuf> {
        build("skopeo")
    }

    /// An image by name.
    pub fn image(&self, name: &str) -> Result<&Image> {
        self.by_name.get(name).with_context(|| format!("the test bed has no image {name:?}"))
    }
}

impl Pair {
    /// The base system that `make demo` shows, and node image a. Builds what is missing of these, and nothing else.
    pub fn demo() -> Result<Self> {
        Self::build("demo")
    }

    /// The base system, and a node image from Debian's newest suite. Builds what is missing of these, and nothing else.
    pub fn newest() -> Result<Self> {
        Self::build("newest")
    }

    /// The same node image, and a base system of that suite.
    pub fn newest_base() -> Result<Self> {
        Self::build("newest-base")
    }

    /// A bootimage and a node image with SELinux. Builds what is missing of these, and nothing else.
    pub fn selinux() -> Result<Self> {
        Self::build("selinux")
    }

    /// The same without any file of the agent.
    pub fn selinux_stock() -> Result<Self> {
        Self::build("selinux-stock")
    }

    /// A system with a composefs root, installed to a file system with fs-verity, and a node image whose root reads only
    /// files with it. Builds what is missing of these, and nothing else. Needs a suite of Debian that moves.
    pub fn sealed() -> Result<Self> {
        Self::build("sealed")
    }

    fn build(name: &str) -> Result<Self> {
        let answer: Value = serde_json::from_slice(&target(name)?)
            .with_context(|| format!("cannot read the answer of build.sh {name}"))?;
        let text = |value: &Value| {
            value.as_str().map(str::to_owned).with_context(|| format!("build.sh {name}: a path is missing"))
        };
        let image = &answer["image"];
        let image = Image {
            repo: text(&image["repo"])?,
            tag: text(&image["tag"])?,
            digest: text(&image["digest"])?,
            commit: image["commit"].as_str().map(str::to_owned),
        };
        let path = |key: &str| text(&answer[key]).map(PathBuf::from);
        let tools = Tools { qemu: path("qemu")?, ssh_key: path("ssh_key")? };
        Ok(Self { tools, boot: path("boot")?, storage: path("storage")?, image })
    }

    /// Returns the bootimage with SELinux as an installed system, as [`Images::disk`].
    pub fn selinux_disk() -> Result<PathBuf> {
        build("selinux-disk")
    }
}

impl AsRef<Tools> for Images {
    fn as_ref(&self) -> &Tools {
        &self.tools
    }
}

impl AsRef<Tools> for Pair {
    fn as_ref(&self) -> &Tools {
        &self.tools
    }
}

/// Returns ostree-ext as a program, as optimised as the agent.
pub fn oracle() -> Result<PathBuf> {
    build("incumbent")
}

/// Returns ostree-ext as a program, as the tests use it.
pub fn ostree_ext() -> Result<PathBuf> {
    build("ostree-ext")
}

/// Returns the directory of an installed agent.
pub fn agent() -> Result<PathBuf> {
    build("agent")
}

/// Returns the path that a target of build.sh prints.
fn build(name: &str) -> Result<PathBuf> {
    Ok(String::from_utf8(target(name)?)?.trim().into())
}

/// Returns two of the paths that a target of build.sh prints as JSON.
fn two_paths(name: &str, keys: [&str; 2]) -> Result<(PathBuf, PathBuf)> {
    let answer: Value =
        serde_json::from_slice(&target(name)?).with_context(|| format!("cannot read the answer of build.sh {name}"))?;
    let path =
        |key: &str| answer[key].as_str().map(PathBuf::from).with_context(|| format!("build.sh {name}: no {key:?}"));
    Ok((path(keys[0])?, path(keys[1])?))
}

/// Builds a target of build.sh; what it prints.
fn target(name: &str) -> Result<Vec<u8>> {
    let mut build = Command::new("bash");
    Ok(succeed(build.arg(project().join("tests/bed/build.sh")).arg(name).stderr(Stdio::inherit()))?.stdout)
}
