//! The image in an OCI layout that has one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Its manifest and config, and where they are.
pub struct Layout {
    path: PathBuf,
    manifest: Value,
    config: Value,
}

impl Layout {
    /// Reads an image.
    pub fn read(path: &Path) -> Result<Self> {
        let index: Value = serde_json::from_slice(&fs::read(path.join("index.json"))?)?;
        let manifest = read_blob(path, &index["manifests"][0]["digest"])?;
        let config = read_blob(path, &manifest["config"]["digest"])?;
        Ok(Self { path: path.to_owned(), manifest, config })
    }

    /// Writes the image.
    pub fn write(&mut self) -> Result<()> {
        let put = |value: &Value| -> Result<(String, usize)> {
            let text = serde_json::to_vec(value)?;
            let digest = format!("sha256:{}", hex::encode(Sha256::digest(&text)));
            fs::write(blob(&self.path, &digest), &text)?;
            Ok((digest, text.len()))
        };
        let (digest, size) = put(&self.config)?;
        self.manifest["config"]["digest"] = json!(digest);
        self.manifest["config"]["size"] = json!(size);
        let (digest, size) = put(&self.manifest)?;
        let mut index: Value = serde_json::from_slice(&fs::read(self.path.join("index.json"))?)?;
        index["manifests"][0]["digest"] = json!(digest);
        index["manifests"][0]["size"] = json!(size);
        fs::write(self.path.join("index.json"), serde_json::to_vec(&index)?)?;
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest as text.
    pub fn manifest(&self) -> String {
        self.manifest.to_string()
    }

    /// The config as text.
    pub fn config(&self) -> String {
        self.config.to_string()
    }

    /// Descriptors of the layers.
    pub fn layers(&self) -> Result<&[Value]> {
        Ok(self.manifest["layers"].as_array().context("a manifest without layers")?)
    }

    /// Diff ids of the layers.
    pub fn diff_ids(&self) -> Result<Vec<&str>> {
        let ids = self.config["rootfs"]["diff_ids"].as_array().context("a config without diff ids")?;
        Ok(ids.iter().filter_map(Value::as_str).collect())
    }

    /// Size of all layers in bytes.
    pub fn compressed_size(&self) -> Result<u64> {
        Ok(self.layers()?.iter().filter_map(|layer| layer["size"].as_u64()).sum())
    }

    /// Adds a layer on top.
    pub fn append(&mut self, blob_file: &Path, descriptor: Value, diff_id: &str) -> Result<()> {
        let digest = descriptor["digest"].as_str().context("a layer without digest")?;
        fs::copy(blob_file, blob(&self.path, digest))?;
        push(&mut self.config["rootfs"]["diff_ids"], [json!(diff_id)])?;
        push(&mut self.config["history"], [json!({ "created_by": "the benchmark's node layer" })])?;
        push(&mut self.manifest["layers"], [descriptor])
    }

    /// Returns this image with the layers of another one on top, in the directory of that one.
    pub fn below(&self, top: &Self) -> Result<Self> {
        for layer in self.layers()? {
            let digest = layer["digest"].as_str().context("a layer without digest")?;
            fs::copy(blob(&self.path, digest), blob(&top.path, digest))?;
        }
        let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let (mut manifest, mut config) = (self.manifest.clone(), self.config.clone());
        push(&mut manifest["layers"], array(&top.manifest["layers"]))?;
        push(&mut config["rootfs"]["diff_ids"], array(&top.config["rootfs"]["diff_ids"]))?;
        push(&mut config["history"], array(&top.config["history"]))?;
        Ok(Self { path: top.path.clone(), manifest, config })
    }
}

fn push(array: &mut Value, entries: impl IntoIterator<Item = Value>) -> Result<()> {
    array.as_array_mut().context("the image's manifest or config is malformed")?.extend(entries);
    Ok(())
}

fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
}

fn read_blob(layout: &Path, digest: &Value) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(blob(layout, digest.as_str().context("a descriptor without digest")?))?)?)
}
