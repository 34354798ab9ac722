//! The layers of an image and their purposes, as its manifest and config describe them.
//!
//! Format source: the OCI image specification, and ostree-ext's labels and annotations (`ostree.final-diffid`,
//! `ostree.commit`, `ostree.components`). chunkah names one component in `org.chunkah.component`.

use std::fmt;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest, MediaType};

use super::{Failure, Kind};
use crate::store::ObjectId;

/// Compression of a layer according to its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// No compression.
    None,
    /// gzip.
    Gzip,
    /// zstd. zstd:chunked is zstd with skippable frames.
    Zstd,
}

/// One layer as the manifest, the config and the annotations describe it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Position in the manifest, from 0.
    pub index: usize,
    /// Digest of the blob and compressed size in bytes.
    pub descriptor: Descriptor,
    /// SHA-256 of the uncompressed archive: `sha256:…`.
    pub diff_id: String,
    /// Compression of the blob.
    pub compression: Compression,
    /// Names of the components (packages) in the layer. Empty if there is no annotation.
    pub components: Vec<String>,
}

impl Layer {
    /// Returns the digest of the blob: `sha256:…`.
    pub fn digest(&self) -> String {
        self.descriptor.digest().to_string()
    }

    /// Returns the compressed size in bytes.
    pub fn size(&self) -> u64 {
        self.descriptor.size()
    }
}

/// The layers of an image by purpose.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The encapsulated commit and its layers. `None` for a plain image.
    pub encapsulated: Option<Encapsulated>,
    /// Plain layers: those above the commit, or all layers of a plain image.
    pub plain: Vec<Layer>,
}

/// An encapsulated commit and its layers.
#[derive(Debug, Clone)]
pub struct Encapsulated {
    /// Commit from the label `ostree.commit`.
    pub commit: ObjectId,
    /// First layer: commit, dirtrees, dirmetas and the content that is in no chunk.
    pub commit_layer: Layer,
    /// Other layers with content of the commit.
    pub chunks: Vec<Layer>,
}

impl Layout {
    /// Iterates over all layers in the manifest's order.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.encapsulated().chain(&self.plain)
    }

    /// Iterates over the layers with the commit, without plain layers.
    pub fn encapsulated(&self) -> impl Iterator<Item = &Layer> {
        self.encapsulated.iter().flat_map(|base| std::iter::once(&base.commit_layer).chain(&base.chunks))
    }
}

/// Returns the layout of an image. An image without the label `ostree.final-diffid` is a plain image. `image` is its name
/// for messages; `architecture` is in Go's terms (`amd64`, `arm64`, `ppc64le`, `s390x`).
///
/// # Errors
/// The image is malformed, or is for another architecture.
pub fn layout(
    image: impl fmt::Display + Copy,
    manifest: &ImageManifest,
    config: &ImageConfiguration,
    architecture: &str,
) -> Result<Layout, Failure> {
    let bad = |fault: String| Failure::new(Kind::BadFormat, format!("image {image} {fault}"));
    let actual = config.architecture().to_string();
    if actual != architecture {
        let message = format!("image {image} is for {actual}, but this machine is {architecture}");
        return Err(Failure::new(Kind::WrongArchitecture, message));
    }
    let mut all = layers(image, manifest, config)?;
    let label = |name: &str| config.labels_of_config().and_then(|labels| labels.get(name)).cloned();
    let Some(final_diff_id) = label("ostree.final-diffid") else {
        return Ok(Layout { encapsulated: None, plain: all });
    };
    let Some(commit) = label("ostree.commit") else {
        return Err(bad("has the label ostree.final-diffid, but not the label ostree.commit".into()));
    };
    let Ok(commit) = commit.parse::<ObjectId>() else {
        return Err(bad(format!("has an invalid label ostree.commit: expected a checksum, found {commit:?}")));
    };
    let diff_ids = config.rootfs().diff_ids();
    let mut positions = diff_ids.iter().enumerate().filter(|(_, id)| **id == final_diff_id).map(|(index, _)| index);
    // If the layer occurs several times (empty layers are equal), the last one ends the commit.
    let Some(last) = positions.next_back() else {
        return Err(bad(format!("has no layer {final_diff_id}, which its label ostree.final-diffid names")));
    };
    let plain = all.split_off(last + 1);
    let commit_layer = all.remove(0);
    Ok(Layout { encapsulated: Some(Encapsulated { commit, commit_layer, chunks: all }), plain })
}

/// Limit of the layers of an image. Container storage supports 500; a manifest of 4 MiB can list 20,000.
const MOST_LAYERS: usize = 1024;

/// Returns the layers of any image in the manifest's order.
pub(super) fn layers(
    image: impl fmt::Display + Copy,
    manifest: &ImageManifest,
    config: &ImageConfiguration,
) -> Result<Vec<Layer>, Failure> {
    let bad = |fault: String| Failure::new(Kind::BadFormat, format!("image {image} {fault}"));
    let (layers, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
    if layers.len() != diff_ids.len() {
        return Err(bad(format!("has {} layers but {} diff ids", layers.len(), diff_ids.len())));
    }
    if layers.is_empty() {
        return Err(bad("has no layers".into()));
    }
    // Later code adds these sizes without checks.
    if layers.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.size())).is_none() {
        return Err(bad("has layers with a total size of more than 16 EiB".into()));
    }
    if layers.len() > MOST_LAYERS {
        return Err(Failure {
            advice: "build the image with fewer layers",
            ..bad(format!("has {} layers: expected at most {MOST_LAYERS}", layers.len()))
        });
    }
    let mut all = Vec::with_capacity(layers.len());
    for (index, (descriptor, diff_id)) in layers.iter().zip(diff_ids).enumerate() {
        let Some(compression) = compression(descriptor.media_type()) else {
            let media_type = descriptor.media_type();
            return Err(bad(format!("has layer {index} ({}) of the unknown type {media_type}", descriptor.digest())));
        };
        if !diff_id.starts_with("sha256:") {
            return Err(bad(format!("has an invalid diff id: expected sha256:…, found {diff_id}")));
        }
        let components = descriptor
            .annotations()
            .as_ref()
            .and_then(|annotations| annotations.get("ostree.components").or(annotations.get("org.chunkah.component")))
            .map(|names| names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
            .unwrap_or_default();
        all.push(Layer { index, descriptor: descriptor.clone(), diff_id: diff_id.clone(), compression, components });
    }
    Ok(all)
}

/// Returns the compression of an OCI or docker media type, or `None` if it is not that of a layer.
pub(super) fn compression(media_type: &MediaType) -> Option<Compression> {
    let name = media_type.to_string();
    let name = name.replace(".nondistributable", "").replace(".foreign", "");
    Some(match name.as_str() {
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => Compression::None,
        "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Compression::Gzip
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            Compression::Zstd
        }
        _ => return None,
    })
}

/// Returns this machine's architecture in Go's terms, as images name it.
pub fn machine_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn digest(byte: usize) -> String {
        format!("sha256:{byte:064x}")
    }

    fn manifest(types: &[&str]) -> ImageManifest {
        let layers: Vec<_> = types
            .iter()
            .enumerate()
            .map(|(index, kind)| {
                json!({"mediaType": kind, "digest": digest(index), "size": 10 + index,
                       "annotations": {"ostree.components": format!("kernel,pkg{index}")}})
            })
            .collect();
        let config = json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(200), "size": 1});
        serde_json::from_value(json!({"schemaVersion": 2, "config": config, "layers": layers})).unwrap()
    }

    fn config(layers: usize, labels: serde_json::Value) -> ImageConfiguration {
        let diff_ids: Vec<_> = (0..layers).map(|index| digest(100 + index)).collect();
        serde_json::from_value(json!({"architecture": "amd64", "os": "linux", "config": {"Labels": labels},
                                      "rootfs": {"type": "layers", "diff_ids": diff_ids}}))
        .unwrap()
    }

    fn labels(last: usize) -> serde_json::Value {
        json!({"ostree.final-diffid": digest(100 + last), "ostree.commit": "ab".repeat(32)})
    }

    #[test]
    fn layers_are_split_by_purpose() {
        let types =
            [GZIP, "application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.docker.image.rootfs.diff.tar.gzip"];
        let layout = layout("img", &manifest(&types), &config(3, labels(1)), "amd64").unwrap();
        assert_eq!(layout.layers().map(|layer| layer.index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(layout.plain.len(), 1);
        let base = layout.encapsulated.unwrap();
        assert_eq!(base.commit.to_string(), "ab".repeat(32));
        assert_eq!((base.commit_layer.index, base.commit_layer.compression), (0, Compression::Gzip));
        assert_eq!(base.chunks.len(), 1);
        assert_eq!(base.chunks[0].compression, Compression::Zstd);
        assert_eq!(base.chunks[0].components, ["kernel", "pkg1"]);
        assert_eq!(base.chunks[0].diff_id, digest(101));
    }

    #[test]
    fn an_image_without_a_final_diff_id_is_plain() {
        for labels in [json!({}), json!(null), json!({"containers.bootc": "1"})] {
            let layout = layout("img", &manifest(&[GZIP; 2]), &config(2, labels), "amd64").unwrap();
            assert!(layout.encapsulated.is_none() && layout.encapsulated().next().is_none());
            assert_eq!(layout.plain.len(), 2);
        }
    }

    #[test]
    fn errors_name_the_image_and_the_fault() {
        let good = manifest(&[GZIP]);
        for (manifest, config, machine, kind, words) in [
            (good.clone(), config(1, labels(0)), "arm64", Kind::WrongArchitecture, vec!["amd64", "arm64"]),
            (manifest(&[]), config(0, json!({})), "amd64", Kind::BadFormat, vec!["has no layers"]),
            (good.clone(), config(0, json!({})), "amd64", Kind::BadFormat, vec!["1 layers but 0 diff ids"]),
            (
                good.clone(),
                config(1, json!({"ostree.final-diffid": digest(100)})),
                "amd64",
                Kind::BadFormat,
                vec!["ostree.commit"],
            ),
            (
                good.clone(),
                config(1, json!({"ostree.final-diffid": digest(100), "ostree.commit": "x"})),
                "amd64",
                Kind::BadFormat,
                vec!["expected a checksum"],
            ),
            (
                {
                    let mut huge = serde_json::to_value(manifest(&[GZIP; 3])).unwrap();
                    huge["layers"].as_array_mut().unwrap().iter_mut().for_each(|layer| layer["size"] = json!(i64::MAX));
                    serde_json::from_value(huge).unwrap()
                },
                config(3, labels(0)),
                "amd64",
                Kind::BadFormat,
                vec!["16 EiB"],
            ),
            (good.clone(), config(2, labels(0)), "amd64", Kind::BadFormat, vec!["1 layers but 2 diff ids"]),
            (good.clone(), config(1, labels(5)), "amd64", Kind::BadFormat, vec!["has no layer"]),
            (
                manifest(&vec![GZIP; MOST_LAYERS + 1]),
                config(MOST_LAYERS + 1, labels(0)),
                "amd64",
                Kind::BadFormat,
                vec!["1025 layers", "at most 1024"],
            ),
            (
                manifest(&["text/plain"]),
                config(1, labels(0)),
                "amd64",
                Kind::BadFormat,
                vec!["unknown type text/plain"],
            ),
        ] {
            let failure = layout("q.io/img:1", &manifest, &config, machine).unwrap_err();
            assert_eq!(failure.kind, kind, "{}", failure.message);
            for word in words.into_iter().chain(["q.io/img:1"]) {
                assert!(failure.message.contains(word), "{}", failure.message);
            }
        }
    }
}
