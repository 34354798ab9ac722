//! A node image with one plain layer more, as a container build makes it, served beside all others.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::images::{Image, Images};
use crate::proc::succeed;

const STORAGE: &str = "docker/registry/v2";

/// A storage for a registry, below `work`, that also has `base` with a layer of `files` (path without a leading slash,
/// text) upon it. Scripts are executable.
pub fn derive(images: &Images, base: &str, work: &Path, files: &[(&str, &str)]) -> Result<(PathBuf, Image)> {
    let storage = Storage::new(images, work)?;
    let image = storage.add_files("derived", images.image(base)?, files)?;
    Ok((storage.path, image))
}

/// The same with what is in the directory `tree`.
pub fn derive_tree(images: &Images, base: &str, work: &Path, tree: &Path) -> Result<(PathBuf, Image)> {
    let storage = Storage::new(images, work)?;
    let image = storage.add("derived", images.image(base)?, tree)?;
    Ok((storage.path, image))
}

/// A storage for a registry that has the images of the test bed and others.
pub struct Storage {
    /// Its directory.
    pub path: PathBuf,
    work: PathBuf,
}

impl Storage {
    /// Creates a storage below `work`.
    pub fn new(images: &Images, work: &Path) -> Result<Self> {
        let storage = Self { path: work.join("storage"), work: work.to_owned() };
        // Content is shared by links, which docker-registry follows; no process writes to shared content.
        for folder in ["blobs/sha256", "repositories"] {
            let shared = images.storage.join(STORAGE).join(folder);
            for group in fs::read_dir(&shared)? {
                let group = group?;
                let own = storage.path.join(STORAGE).join(folder).join(group.file_name());
                fs::create_dir_all(&own)?;
                for entry in fs::read_dir(group.path())? {
                    let entry = entry?;
                    symlink(entry.path(), own.join(entry.file_name()))?;
                }
            }
        }
        Ok(storage)
    }

    fn blobs(&self) -> PathBuf {
        self.path.join(STORAGE).join("blobs/sha256")
    }

    /// Adds the image `cluster/NAME`: `base` with a layer of `files` upon it, as in [`derive`].
    pub fn add_files(&self, name: &str, base: &Image, files: &[(&str, &str)]) -> Result<Image> {
        let tree = self.work.join(format!("{name}-layer"));
        for (path, text) in files {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().context("a file in the root")?)?;
            fs::write(&path, text)?;
            if text.starts_with("#!") {
                fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
            }
        }
        self.add(name, base, &tree)
    }

    /// The same with what is in the directory `tree`.
    pub fn add(&self, name: &str, base: &Image, tree: &Path) -> Result<Image> {
        let (blobs, work) = (self.blobs(), self.work.join(name));
        fs::create_dir_all(&work)?;
        let tar = work.join("layer.tar");
        let mut pack = Command::new("tar");
        pack.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--mode=u=rwX,go=rX", "-cf"]).arg(&tar);
        let mut top = fs::read_dir(tree)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        top.sort();
        succeed(pack.arg("-C").arg(tree).args(top))?;
        let diff_id = digest(&tar)?;
        succeed(Command::new("gzip").arg("-1n").arg(&tar))?;
        let (layer, layer_size) = store(&blobs, &work.join("layer.tar.gz"))?;

        let read = |digest: &str| -> Result<Value> {
            let hex = digest.trim_start_matches("sha256:");
            let path = blobs.join(&hex[..2]).join(hex).join("data");
            serde_json::from_slice(&fs::read(&path)?).with_context(|| format!("reading {}", path.display()))
        };
        let mut manifest = read(&base.digest)?;
        let mut config = read(manifest["config"]["digest"].as_str().context("no config")?)?;
        let list = |value: &mut Value| value.as_array_mut().context("no list").map(std::mem::take);
        let mut diff_ids = list(&mut config["rootfs"]["diff_ids"])?;
        diff_ids.push(diff_id.into());
        config["rootfs"]["diff_ids"] = diff_ids.into();
        if let Some(history) = config["history"].as_array_mut() {
            history.push(json!({"created_by": "one layer more"}));
        }
        let write = |name: &str, value: &Value| -> Result<(String, u64)> {
            fs::write(work.join(name), serde_json::to_vec(value)?)?;
            store(&blobs, &work.join(name))
        };
        let (config, config_size) = write("config.json", &config)?;
        manifest["config"]["digest"] = config.clone().into();
        manifest["config"]["size"] = config_size.into();
        let mut layers = list(&mut manifest["layers"])?;
        layers.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": layer, "size": layer_size
        }));
        let names: Vec<_> = layers.iter().filter_map(|one| one["digest"].as_str().map(str::to_owned)).collect();
        manifest["layers"] = layers.into();
        let (digest, _) = write("manifest.json", &manifest)?;

        let repo = format!("cluster/{name}");
        let own = self.path.join(STORAGE).join("repositories").join(&repo);
        let link = |folder: &str, digest: &str| -> Result<()> {
            let folder = own.join(folder).join(digest.trim_start_matches("sha256:"));
            fs::create_dir_all(&folder)?;
            Ok(fs::write(folder.join("link"), digest)?)
        };
        names.iter().chain([&config]).try_for_each(|digest| link("_layers/sha256", digest))?;
        link("_manifests/revisions/sha256", &digest)?;
        Ok(Image { repo, tag: "latest".into(), digest, commit: None })
    }
}

fn digest(path: &Path) -> Result<String> {
    let output = succeed(Command::new("sha256sum").arg(path))?;
    let text = String::from_utf8(output.stdout)?;
    Ok(format!("sha256:{}", text.split_whitespace().next().context("sha256sum said nothing")?))
}

/// Puts a file among the blobs. Returns its digest and size.
fn store(blobs: &Path, file: &Path) -> Result<(String, u64)> {
    let digest = digest(file)?;
    let hex = digest.trim_start_matches("sha256:");
    let folder = blobs.join(&hex[..2]).join(hex);
    fs::create_dir_all(&folder)?;
    fs::copy(file, folder.join("data"))?;
    Ok((digest, fs::metadata(file)?.len()))
}
