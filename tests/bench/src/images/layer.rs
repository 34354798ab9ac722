//! The plain layer that makes a node image of a base.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Commit;
use super::layout::Layout;
use super::tree::{check_out, for_each_file};

/// A compressed layer.
pub struct Layer {
    path: PathBuf,
    digest: String,
    diff_id: String,
    size: u64,
    /// Content of its files in bytes.
    pub bytes: u64,
}

/// Puts what `node` has below `/usr` at paths that `base` lacks into a layer, without kernel modules and package database.
pub fn make(node: &Commit, base: &Commit, work: &Path) -> Result<Layer> {
    let (node_dir, base_dir) = (work.join("node"), work.join("base"));
    check_out(node, Some("/usr"), &node_dir)?;
    check_out(base, Some("/usr"), &base_dir)?;
    let path = work.join("layer.tar.gz");
    let file = Hashing::new(BufWriter::new(File::create(&path)?));
    let mut tar = tar::Builder::new(Hashing::new(GzEncoder::new(file, Compression::new(6))));
    let mut bytes = 0;
    for_each_file(&node_dir, &mut |path, size| {
        let name = path.strip_prefix(&node_dir)?;
        let left_out = name.starts_with("lib/modules") || name.starts_with("lib/sysimage");
        // Where the base has a file and the node a directory, ostree-ext cannot lay one over the other.
        let in_base = |path: &Path| base_dir.join(path).symlink_metadata().ok();
        let blocked = name.ancestors().skip(1).filter_map(in_base).any(|meta| !meta.is_dir());
        if left_out || blocked || in_base(name).is_some() {
            return Ok(());
        }
        bytes += size;
        // An image's defaults are at /etc.
        let name = if name.starts_with("etc") { name.to_owned() } else { Path::new("usr").join(name) };
        add(&mut tar, path, &name).with_context(|| format!("adding {}", path.display()))
    })?;
    let (gzip, diff_id) = tar.into_inner()?.finish();
    let (mut out, digest) = gzip.finish()?.finish();
    out.flush()?;
    drop(out);
    for dir in [node_dir, base_dir] {
        fs::remove_dir_all(dir)?;
    }
    let size = fs::metadata(&path)?.len();
    Ok(Layer { path, digest, diff_id, size, bytes })
}

fn add<W: Write>(tar: &mut tar::Builder<W>, path: &Path, name: &Path) -> Result<()> {
    let meta = path.symlink_metadata()?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(meta.uid().into());
    header.set_gid(meta.gid().into());
    header.set_mtime(0);
    if meta.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, fs::read_link(path)?)?;
    } else {
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(meta.len());
        tar.append_data(&mut header, name, File::open(path)?)?;
    }
    Ok(())
}

impl Layer {
    /// Adds the layer to an image.
    pub fn append_to(&self, image: &mut Layout) -> Result<()> {
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let descriptor = json!({ "mediaType": media_type, "digest": self.digest, "size": self.size });
        image.append(&self.path, descriptor, &self.diff_id)
    }
}

/// Hashes what passes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    fn finish(self) -> (W, String) {
        (self.inner, format!("sha256:{}", hex::encode(self.hash.finalize())))
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(data)?;
        self.hash.update(&data[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}
