//! Computes the wanted set and the order in which layers are read. Pure.

use std::collections::HashSet;

use crate::image::Layer;
use crate::store::{ObjectId, ObjectSet};

use super::tree::{Place, Target};

/// Returns the wanted set: the content objects of the target that neither the booted repo nor the node store has.
/// Objects that occur only under `/usr/lib/modules` are wanted only by a `complete` import.
pub(super) fn wanted(target: &Target, booted: &ObjectSet, stored: &ObjectSet, complete: bool) -> ObjectSet {
    target
        .content
        .iter()
        .filter(|(_, place)| complete || **place == Place::Anywhere)
        .map(|(id, _)| *id)
        .filter(|id| !booted.contains(id) && !stored.contains(id))
        .collect()
}

/// Returns true if every content object of the target is in the booted repo or is `present`.
pub(super) fn is_complete(target: &Target, booted: &ObjectSet, present: impl Fn(&ObjectId) -> bool) -> bool {
    target.content.keys().all(|id| booted.contains(id) || present(id))
}

/// Layers that are read in parallel, after the layers of earlier rounds.
pub(super) struct Round<'a> {
    pub(super) layers: Vec<&'a Layer>,
    /// True if the sizes count towards the expected total. They do not for layers that an earlier run read: these are
    /// read again only if a journal or a ref claims objects that are missing.
    pub(super) expected: bool,
}

/// Part of a layer that earlier runs read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Earlier {
    /// Nothing.
    Unread,
    /// Everything except objects that occur only in `/usr/lib/modules`, which this import wants.
    WithoutModules,
    /// Everything that this import can want.
    Read,
}

/// Sorts layers into the rounds in which they are read. A round starts when all layers of the round before were read.
///
/// 1. Layers that no run has read, and kernel layers that an earlier run read without the modules.
/// 2. Kernel layers that no run has read, unless the import is `complete`: usually none of their objects is wanted.
/// 3. The layer with index 0, if it was read without the modules. It holds files that do not belong to a package, such
///    as those that depmod writes.
/// 4. Other layers that were read without the modules.
/// 5. Layers that were read completely.
///
/// Within a round, larger layers come first, so that all readers finish at about the same time.
pub(super) fn rounds<'a>(
    layers: impl Iterator<Item = &'a Layer>,
    earlier: impl Fn(&Layer) -> Earlier,
    complete: bool,
) -> [Round<'a>; 5] {
    let mut rounds = [const { Vec::new() }; 5];
    // An image may list one blob twice.
    let mut seen = HashSet::new();
    for layer in layers.filter(|layer| seen.insert(layer.digest())) {
        let round = match (earlier(layer), is_kernel_layer(layer)) {
            (Earlier::Unread, true) if !complete => 1,
            (Earlier::Unread, _) | (Earlier::WithoutModules, true) => 0,
            (Earlier::WithoutModules, false) if layer.index == 0 => 2,
            (Earlier::WithoutModules, false) => 3,
            (Earlier::Read, _) => 4,
        };
        rounds[round].push(layer);
    }
    let mut number = 0;
    rounds.map(|mut layers| {
        layers.sort_by_key(|layer| (is_kernel_layer(layer), std::cmp::Reverse(layer.size()), layer.index));
        number += 1;
        Round { layers, expected: number < 5 }
    })
}

/// Returns true if all components that the layer lists are kernel packages.
pub(super) fn is_kernel_layer(layer: &Layer) -> bool {
    !layer.components.is_empty() && layer.components.iter().all(|name| is_kernel_package(name))
}

/// Returns true for names of kernel and module packages of Fedora and Debian. Headers and tools do not count.
fn is_kernel_package(name: &str) -> bool {
    // Components may carry a path-like prefix (`rpm/kernel-core`).
    let name = name.rsplit('/').next().unwrap_or(name);
    let one_of =
        |prefixes: &[&str]| prefixes.iter().any(|prefix| name == *prefix || name.starts_with(&format!("{prefix}-")));
    name == "kernel"
        || one_of(&[
            "kernel-core",
            "kernel-modules",
            "kernel-rt-core",
            "kernel-rt-modules",
            "kernel-64k-core",
            "kernel-64k-modules",
        ])
        || one_of(&["linux-image", "linux-modules", "linux-modules-extra"])
        || name == "initramfs"
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::image::Compression;
    use proptest::prelude::*;

    fn layer(index: usize, size: u64, components: &[&str]) -> Layer {
        let digest: oci_spec::image::Sha256Digest = format!("{index:02x}").repeat(32).parse().unwrap();
        let descriptor = oci_spec::image::Descriptor::new(oci_spec::image::MediaType::ImageLayerGzip, size, digest);
        let components = components.iter().map(|name| name.to_string()).collect();
        Layer { index, descriptor, diff_id: String::new(), compression: Compression::Gzip, components }
    }

    #[test]
    fn rounds_put_kernel_layers_late_and_large_layers_first() {
        let layers = [
            layer(1, 10, &["bash"]),
            layer(2, 900, &["kernel-core", "kernel-modules-core"]),
            layer(3, 30, &["kernel-headers"]),
            layer(4, 20, &[]),
            layer(5, 800, &["linux-image-6.1.0-30-amd64"]),
            layer(1, 10, &["bash"]),
            layer(7, 5, &["kernel-core", "systemd"]),
            layer(0, 7, &[]),
        ];
        let order = |earlier: &dyn Fn(&Layer) -> Earlier, complete| {
            let rounds = rounds(layers.iter(), earlier, complete);
            assert!(rounds.iter().enumerate().all(|(number, round)| round.expected == (number < 4)));
            rounds.map(|round| round.layers.iter().map(|layer| layer.index).collect::<Vec<_>>())
        };
        let none = || -> Vec<usize> { Vec::new() };
        let unread = |_: &Layer| Earlier::Unread;
        assert_eq!(order(&unread, false), [vec![3, 4, 1, 0, 7], vec![2, 5], none(), none(), none()]);
        assert_eq!(order(&unread, true), [vec![3, 4, 1, 0, 7, 2, 5], none(), none(), none(), none()]);
        let two = |layer: &Layer| if [2, 4].contains(&layer.index) { Earlier::Read } else { Earlier::Unread };
        assert_eq!(order(&two, false), [vec![3, 1, 0, 7], vec![5], none(), none(), vec![4, 2]]);
        // After a pivot that did not need layer 5: the missing modules are probably there or in layer 0.
        let pivoted = |layer: &Layer| if layer.index == 5 { Earlier::Unread } else { Earlier::WithoutModules };
        assert_eq!(order(&pivoted, true), [vec![2, 5], none(), vec![0], vec![3, 4, 1, 7], none()]);
    }

    fn ids() -> impl Strategy<Value = ObjectSet> {
        prop::collection::hash_set((0_u8..60).prop_map(|n| ObjectId([n; 32])), 0..50)
    }

    proptest! {
        #[test]
        fn wanted_set_is_minimal_and_complete(everywhere in ids(), modules in ids(), booted in ids(), stored in ids(), complete: bool) {
            let mut target = Target::default();
            for id in &modules {
                target.content.insert(*id, Place::ModulesOnly);
            }
            for id in &everywhere {
                target.content.insert(*id, Place::Anywhere);
            }
            let set = wanted(&target, &booted, &stored, complete);
            prop_assert!(set.is_disjoint(&booted) && set.is_disjoint(&stored));
            prop_assert!(set.iter().all(|id| target.content.contains_key(id)));
            let after: ObjectSet = stored.union(&set).copied().collect();
            prop_assert!(everywhere.iter().all(|id| booted.contains(id) || after.contains(id)));
            if complete {
                prop_assert!(is_complete(&target, &booted, |id| after.contains(id)));
            } else {
                prop_assert!(set.iter().all(|id| everywhere.contains(id)));
            }
            prop_assert!(wanted(&target, &booted, &after, complete).is_empty(), "an import of the wanted set leaves nothing wanted");
        }
    }
}
