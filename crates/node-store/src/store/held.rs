//! Layers that the booted repo holds, as ostree-ext and bootc import them.
//!
//! Format source: ostree-ext's `container/store.rs`. There is a ref for each layer and each image. The commit of an image
//! has its manifest, its config, and the number of entries that were left out of each plain layer.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::image::{ImageConfiguration, ImageManifest};
use ostree::glib::{Variant, VariantDict, VariantTy};

use super::refs::{IMAGE_REF_PREFIX, layer_ref};
use super::{BootedRepo, ObjectId, ObjectType};

/// A layer of which the booted repo has all objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldLayer {
    /// Commit with all entries of a plain layer. `None` for a layer of an encapsulated commit, and for a plain layer of
    /// which some entries were left out.
    pub tree: Option<ObjectId>,
}

impl BootedRepo {
    /// Returns the layers of all images in the repo, by diff id. Images with unreadable metadata are skipped, so that
    /// their layers are fetched.
    pub fn held_layers(&self) -> HashMap<String, HeldLayer> {
        let heads = self.path.join("refs/heads");
        let images = refs_below(&heads.join(IMAGE_REF_PREFIX));
        let commits = images.iter().filter_map(|path| commit_of(path));
        commits.filter_map(|commit| self.layers_of(&commit, &heads)).flatten().collect()
    }

    fn layers_of(&self, image: &ObjectId, heads: &Path) -> Option<Vec<(String, HeldLayer)>> {
        let bytes = self.read_metadata(image, ObjectType::Commit).ok()??;
        let commit = Variant::from_data_with_type(bytes, VariantTy::new("(a{sv}aya(say)sstayay)").ok()?);
        let metadata = VariantDict::new(Some(&commit.child_value(0)));
        let text = |key| metadata.lookup::<String>(key).ok().flatten();
        let manifest: ImageManifest = serde_json::from_str(&text("ostree.manifest")?).ok()?;
        let config: ImageConfiguration = serde_json::from_str(&text("ostree.container.image-config")?).ok()?;
        let left_out: HashMap<String, HashMap<String, u32>> = metadata.lookup("ostree.tar-filtered").ok()??;
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
            Some((diff_id.clone(), HeldLayer { tree: is_whole.then_some(commit) }))
        });
        Some(held.collect())
    }
}

fn commit_of(path: &Path) -> Option<ObjectId> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
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
