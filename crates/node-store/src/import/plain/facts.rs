//! Reads the properties of the base that decide how plain layers are imported. Blocks.

use std::sync::Arc;

use ostree::glib;

use crate::image::Failure;
use crate::store::ObjectType;

use super::kept::KeptTree;
use super::label::{PolicyFiles, policy_objects};
use super::merge::{Dir, tree_of};
use super::path::Placement;
use crate::import::base::Base;
use crate::import::state::Import;
use crate::import::tree::{Lookup, TreeError};

/// Properties of the base that decide how plain layers are imported.
#[derive(Debug, Clone)]
pub(in crate::import) struct BaseFacts {
    pub(super) placement: Placement,
    /// The SELinux policy that labels the layers while they are read: that of the base commit, or of the booted system
    /// for a plain image. Files that the policy of the merged tree labels otherwise are relabelled. `None` if there is
    /// none.
    pub(super) policy: Option<Arc<PolicyFiles>>,
    /// Identifies these properties: the same layer read with the same key gives the same tree.
    key: String,
}

impl BaseFacts {
    /// Returns the facts of a base without a policy.
    #[cfg(any(test, fuzzing))]
    pub(in crate::import) fn without_policy(placement: Placement) -> Self {
        Self { placement, policy: None, key: String::new() }
    }

    /// Reads the facts. Returns `None` while objects that are needed for this have not been stored.
    pub(in crate::import) fn read(import: &Import) -> Result<Option<Self>, Failure> {
        let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
        let fail = |error: TreeError| import.tree_failure(&error);
        let Base::Commit(commit) = import.base else { return Ok(Some(Self::of_empty_tree(import))) };
        let mut root = tree_of(&commit, lookup).map_err(fail)?;
        let mut placement = Placement { keep_var: ostree::check_version(2024, 3), any_top_level: false };
        for path in ["etc/ostree/prepare-root.conf", "usr/lib/ostree/prepare-root.conf"] {
            let path: Vec<String> = path.split('/').map(str::to_owned).collect();
            let Some(id) = root.file(&path, lookup).map_err(fail)? else { continue };
            let Some(object) = import.store.find_object(&id, ObjectType::File) else { return Ok(None) };
            let config = std::fs::read_to_string(object).map_err(|error| import.local(error))?;
            placement.any_top_level = root_is_overlay(&config);
            break;
        }
        let mut policy = None;
        if let Some(objects) = policy_objects(&mut root, &import.store, lookup).map_err(fail)? {
            let Some(files) = objects.show(&import.store).map_err(|error| import.local(error))? else {
                return Ok(None);
            };
            policy = Some(files);
        }
        Ok(Some(Self::new(import.base, placement, policy)))
    }

    /// Returns the facts of the empty tree. As in bootc, its layers may have content in any top-level directory.
    fn of_empty_tree(import: &Import) -> Self {
        let placement = Placement { keep_var: ostree::check_version(2024, 3), any_top_level: true };
        // Without the booted system's policy, more files are relabelled.
        Self::new(Base::Empty, placement, booted_policy(import))
    }

    /// Returns the facts with the policy that a plain image has in `layers`, if it is a complete and active one. Returns
    /// `None` if objects of the policy are not stored.
    pub(in crate::import) fn with_policy_of(
        &self,
        import: &Import,
        layers: &[Arc<KeptTree>],
    ) -> Result<Option<Self>, Failure> {
        let layers = layers.iter().map(|kept| kept.tree(import)).collect::<Result<Vec<_>, _>>()?;
        let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
        let mut root = Dir::empty(Arc::default());
        let laid = layers.iter().try_for_each(|layer| root.lay(layer, &|_| false, lookup).map(drop));
        let objects = laid.ok().and_then(|()| policy_objects(&mut root, &import.store, lookup).ok().flatten());
        Ok(match objects.filter(|objects| self.policy.as_ref().is_none_or(|policy| policy.objects != *objects)) {
            Some(objects) => match objects.show(&import.store) {
                Ok(None) => None,
                Ok(Some(policy)) if policy.is_active() => Some(Self::new(import.base, self.placement, Some(policy))),
                _ => Some(self.clone()),
            },
            None => Some(self.clone()),
        })
    }

    fn new(base: Base, placement: Placement, policy: Option<PolicyFiles>) -> Self {
        let identity = policy.as_ref().map(|policy| policy.objects.identity()).unwrap_or_default();
        Self { placement, policy: policy.map(Arc::new), key: format!("{placement:?} {base}{identity}") }
    }

    /// Returns the name under which the store keeps the tree of a layer.
    pub(in crate::import) fn list_name(&self, diff_id: &str) -> String {
        use sha2::Digest;
        hex::encode(sha2::Sha256::digest(format!("5 {diff_id} {}", self.key)))
    }
}

/// Returns the active policy of the booted commit, or `None` if it has none or cannot be read.
fn booted_policy(import: &Import) -> Option<PolicyFiles> {
    let commit = import.booted.as_ref()?.commit?;
    let lookup: &mut Lookup<'_> = &mut |id, kind| import.read_metadata(id, kind);
    let mut root = tree_of(&commit, lookup).ok()?;
    let objects = policy_objects(&mut root, &import.store, lookup).ok()??;
    objects.show(&import.store).ok()?.filter(PolicyFiles::is_active)
}

/// Returns true if the root directory of the booted system will be an overlay, so that it may have any content.
/// `config` is the content of `prepare-root.conf`.
fn root_is_overlay(config: &str) -> bool {
    let file = glib::KeyFile::new();
    if file.load_from_data(config, glib::KeyFileFlags::NONE).is_err() {
        return false;
    }
    let transient = ["transient", "transient-ro"].iter().any(|key| file.boolean("root", key).unwrap_or(false));
    let composefs = file.string("composefs", "enabled");
    transient
        || composefs.is_ok_and(|value| matches!(value.as_str(), "signed" | "verity" | "maybe" | "yes" | "true" | "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transient_and_composefs_roots_are_overlays() {
        for (config, expected) in [
            ("", false),
            ("[root]\n", false),
            ("[root]\ntransient=true\n", true),
            ("[root]\ntransient=false\n", false),
            ("[root]\ntransient-ro=true\n", true),
            ("[root]\ntransient-ro=false\n", false),
            ("[composefs]\nenabled=verity\n", true),
            ("[composefs]\nenabled = false\n", false),
            ("[composefs]\nenabled=maybe\n", true),
            ("[composefs]\nenabled=signed\n", true),
            ("not a key file", false),
        ] {
            assert_eq!(root_is_overlay(config), expected, "{config:?}");
        }
    }
}
