//! Layers that the booted repo holds, as ostree-ext and bootc import them.
//!
//! Format source: ostree-ext's `container/store.rs`. There is a ref for each layer and each image. The commit of an image
//! has its manifest, its config, and the number of entries that were left out of each plain layer.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::image::{ImageConfiguration, ImageManifest};

use super::refs::{IMAGE_REF_PREFIX, commit_of, layer_ref};
use super::{BootedRepo, NodeStore, ObjectId, ObjectType, commit_metadata};

/// A layer of which the booted repo has all objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldLayer {
    /// Commit with the entries of a plain layer. `None` for a layer of an encapsulated commit, and for a plain layer of
    /// which some entries are known to be left out.
    pub tree: Option<ObjectId>,
    /// True if all images with the layer are plain images, whose importer accepts content in any top-level directory.
    pub any_top_level: bool,
}

/// Layers of the images in the booted repo.
#[derive(Debug, Default)]
pub struct HeldLayers {
    by_digest: HashMap<String, HeldLayer>,
    /// Digests of the booted image's layers, by diff id. The importers verify digests, but not diff ids. Those of the
    /// booted image are trusted, because its content is that of the running system.
    booted: HashMap<String, String>,
}

impl HeldLayers {
    /// Returns the layer with this digest, or the booted image's layer with this diff id.
    pub fn find(&self, digest: &str, diff_id: &str) -> Option<&HeldLayer> {
        self.by_digest.get(digest).or_else(|| self.by_digest.get(self.booted.get(diff_id)?))
    }

    /// Returns the names of the refs of all layers.
    pub(super) fn refs(&self) -> HashSet<String> {
        self.by_digest.keys().map(|digest| layer_ref(digest)).collect()
    }

    fn add(&mut self, digest: String, layer: HeldLayer) {
        let known = self.by_digest.entry(digest).or_insert(layer);
        // An image has no record of a layer that an earlier image brought.
        known.tree = known.tree.and(layer.tree);
        known.any_top_level &= layer.any_top_level;
    }
}

impl BootedRepo {
    /// Returns the layers of all images in the repo. Images with unreadable metadata are skipped, so that their layers are
    /// fetched.
    pub fn held_layers(&self) -> HeldLayers {
        let heads = self.path.join("refs/heads");
        let images = refs_below(&heads.join(IMAGE_REF_PREFIX));
        // A later import may have moved the ref of the booted image.
        let commits: HashSet<ObjectId> = images.iter().filter_map(|path| commit_of(path)).chain(self.commit).collect();
        let mut held = HeldLayers::default();
        for image in commits {
            for (digest, diff_id, layer) in self.layers_of(&image, &heads).unwrap_or_default() {
                if self.commit == Some(image) {
                    held.booted.insert(diff_id, digest.clone());
                }
                held.add(digest, layer);
            }
        }
        held
    }

    /// Returns the digest, diff id and state of the image's layers.
    fn layers_of(&self, image: &ObjectId, heads: &Path) -> Option<Vec<(String, String, HeldLayer)>> {
        let metadata = commit_metadata(self.read_metadata(image, ObjectType::Commit).ok()??)?;
        let text = |key| metadata.lookup::<String>(key).ok().flatten();
        let manifest: ImageManifest = serde_json::from_str(&text("ostree.manifest")?).ok()?;
        let config: ImageConfiguration = serde_json::from_str(&text("ostree.container.image-config")?).ok()?;
        // bootc 1.6 and later do not write this key.
        let left_out: Option<HashMap<String, HashMap<String, u32>>> = metadata.lookup("ostree.tar-filtered").ok()?;
        let left_out = left_out.unwrap_or_default();
        let (layers, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
        if layers.len() != diff_ids.len() {
            return None;
        }
        let last = config.labels_of_config().and_then(|labels| labels.get("ostree.final-diffid"));
        let encapsulated = last.and_then(|last| diff_ids.iter().rposition(|id| id == last)).map_or(0, |at| at + 1);
        let held = layers.iter().zip(diff_ids).enumerate().filter_map(|(at, (layer, diff_id))| {
            let digest = layer.digest().to_string();
            let commit = commit_of(&heads.join(layer_ref(&digest)))?;
            let is_whole = at >= encapsulated && left_out.get(&digest).is_none_or(HashMap::is_empty);
            let layer = HeldLayer { tree: is_whole.then_some(commit), any_top_level: last.is_none() };
            Some((digest, diff_id.clone(), layer))
        });
        Some(held.collect())
    }
}

impl NodeStore {
    /// Returns the digest of the image's manifest in the metadata of its commit, or `None` if it cannot be read.
    pub(crate) fn manifest_digest(&self, commit: &ObjectId) -> Option<String> {
        let metadata = commit_metadata(self.read_metadata(commit, ObjectType::Commit).ok()??)?;
        metadata.lookup("ostree.manifest-digest").ok()?
    }
}

/// Lists the files below a directory of refs.
fn refs_below(dir: &Path) -> Vec<PathBuf> {
    let (mut found, mut queue) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = queue.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => queue.push(entry.path()),
                Ok(_) => found.push(entry.path()),
                Err(_) => {}
            }
        }
    }
    found
}
