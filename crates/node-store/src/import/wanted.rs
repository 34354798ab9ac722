//! Which objects are to be written, and in which order layers are to be read. Pure.

use std::collections::HashSet;

use crate::image::Layer;
use crate::store::{ObjectId, ObjectSet};

use super::tree::{Place, Target};

/// The wanted set: what the target has and neither the booted repo nor the node store. Unless the
/// import is to be `complete`, what only occurs under `/usr/lib/modules` is left out.
pub(super) fn wanted(target: &Target, booted: &ObjectSet, stored: &ObjectSet, complete: bool) -> ObjectSet {
    target
        .content
        .iter()
        .filter(|(_, place)| complete || **place == Place::Anywhere)
        .map(|(id, _)| *id)
        .filter(|id| !booted.contains(id) && !stored.contains(id))
        .collect()
}

/// Whether every content object of the target is in the booted repo or the node store.
pub(super) fn is_complete(target: &Target, booted: &ObjectSet, present: impl Fn(&ObjectId) -> bool) -> bool {
    target.content.keys().all(|id| booted.contains(id) || present(id))
}

/// Layers to be read side by side, after those of the rounds before.
pub(super) struct Round<'a> {
    pub(super) layers: Vec<&'a Layer>,
    /// Whether the sizes are part of what the pull is expected to fetch. Those of layers that were read
    /// before are not: only a journal or a ref that says too much makes them due again.
    pub(super) expected: bool,
}

/// What earlier runs read of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Earlier {
    /// Nothing.
    Unread,
    /// All but what only `/usr/lib/modules` has, and this import wants that too.
    WithoutModules,
    /// Everything that this import can want.
    Read,
}

/// The rounds in which to read layers. A round is not begun while a layer of the round before may still bring the last
/// wanted object.
///
/// Layers that no run has read come first. Then, unless the import is to be `complete`, those that hold nothing but the
/// kernel, of which mostly nothing is wanted. If a run before this one left out the modules, the kernel's layers come
/// with the first, and then the layers that were read without them: first the one with index 0, which holds what
/// belongs to no package, such as the files that depmod writes. Last, the layers that should be of no use.
///
/// Larger ones before smaller, so that several readers finish at about the same time.
pub(super) fn rounds<'a>(
    layers: impl Iterator<Item = &'a Layer>,
    earlier: impl Fn(&Layer) -> Earlier,
    complete: bool,
) -> [Round<'a>; 5] {
    let mut rounds = [const { Vec::new() }; 5];
    // An image may list one blob twice; reading it once is enough.
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

/// Whether the layer says that all its components are kernel packages.
fn is_kernel_layer(layer: &Layer) -> bool {
    !layer.components.is_empty() && layer.components.iter().all(|name| is_kernel_package(name))
}

/// Kernel and module packages as Fedora and Debian name them. Headers and tools are not.
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
    fn kernels_last_and_alone_large_ones_first_doubles_once() {
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
        // After a pivot that did not need the layer 5: the rest of its modules is likely there, or in the first layer.
        let pivoted = |layer: &Layer| if layer.index == 5 { Earlier::Unread } else { Earlier::WithoutModules };
        assert_eq!(order(&pivoted, true), [vec![2, 5], none(), vec![0], vec![3, 4, 1, 7], none()]);
    }

    fn ids() -> impl Strategy<Value = ObjectSet> {
        prop::collection::hash_set((0_u8..60).prop_map(|n| ObjectId([n; 32])), 0..50)
    }

    proptest! {
        #[test]
        fn nothing_superfluous_and_nothing_forgotten(everywhere in ids(), modules in ids(), booted in ids(), stored in ids(), complete: bool) {
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
            prop_assert!(wanted(&target, &booted, &after, complete).is_empty(), "idempotent");
        }
    }
}
