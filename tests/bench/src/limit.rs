//! The fastest pull that is possible: the same blobs, copied by skopeo and decompressed on all cores, and nothing else done.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::{Context, Result, ensure};
use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::proc::{output, run};

/// First bytes of compressed files.
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Gives the registry at `address` an image that has only those layers of `name` (NAME:TAG) whose digests are in
/// `fetched`; its NAME:TAG, or `None` if there are none.
pub fn image_of(address: &str, name: &str, fetched: &BTreeSet<String>) -> Result<Option<String>> {
    let spec = format!("docker://{address}/{name}");
    let mut manifest: Value = serde_json::from_str(&run("skopeo", ["inspect", "--raw", "--tls-verify=false", &spec])?)?;
    let layers = manifest["layers"].as_array_mut().context("a manifest without layers")?;
    layers.retain(|layer| layer["digest"].as_str().is_some_and(|digest| fetched.contains(digest)));
    if layers.is_empty() {
        return Ok(None);
    }
    let (repository, tag) = name.rsplit_once(':').context("an image without tag")?;
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), serde_json::to_vec(&manifest)?)?;
    let media_type = manifest["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json");
    let mut curl = Command::new("curl");
    curl.args(["-fsS", "-X", "PUT", "-H", &format!("Content-Type: {media_type}"), "--data-binary"]);
    curl.arg(format!("@{}", file.path().display()));
    output(curl.arg(format!("http://{address}/v2/{repository}/manifests/limit-{tag}")))?;
    Ok(Some(format!("{repository}:limit-{tag}")))
}

/// Decompresses all gzip and zstd files in `dir` to nowhere, one per core at a time, the largest first.
pub fn decompress(dir: &Path) -> Result<()> {
    let mut blobs: Vec<(u64, bool, PathBuf)> = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let mut magic = [0; 4];
        let known = File::open(entry.path())?.read(&mut magic)? == 4 && (magic == ZSTD || magic.starts_with(&GZIP));
        if known {
            blobs.push((entry.metadata()?.len(), magic == ZSTD, entry.path()));
        }
    }
    ensure!(!blobs.is_empty(), "skopeo copied no compressed layer");
    blobs.sort();
    let queue = Mutex::new(blobs);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || -> Result<()> {
        while let Some((_, is_zstd, path)) = next() {
            let file = File::open(&path)?;
            let mut decoder: Box<dyn Read> =
                if is_zstd { Box::new(zstd::Decoder::new(file)?) } else { Box::new(MultiGzDecoder::new(file)) };
            let mut buffer = vec![0; 256 * 1024];
            while decoder.read(&mut buffer)? > 0 {}
        }
        Ok(())
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().ok().context("a decompressing thread panicked")?)
    })
}
