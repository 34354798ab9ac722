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

/// The rounds in which to read layers. First those that nobody has `read` yet, then the rest. Unless the
/// import is to be `complete`, mostly nothing is wanted of layers that hold nothing but the kernel: they
/// wait for a round of their own, so that none is begun while another layer may still bring the last
/// wanted object. Larger ones before smaller, so that several readers finish at about the same time.
pub(super) fn rounds<'a>(
    layers: impl Iterator<Item = &'a Layer>,
    read: impl Fn(&Layer) -> bool,
    complete: bool,
) -> [Round<'a>; 3] {
    let (mut first, mut kernel, mut again) = (Vec::new(), Vec::new(), Vec::new());
    // An image may list one blob twice; reading it once is enough.
    let mut seen = HashSet::new();
    for layer in layers.filter(|layer| seen.insert(layer.digest())) {
        match (read(layer), !complete && is_kernel_layer(layer)) {
            (true, _) => again.push(layer),
            (false, true) => kernel.push(layer),
            (false, false) => first.push(layer),
        }
    }
    for layers in [&mut first, &mut kernel, &mut again] {
        layers.sort_by_key(|layer| (is_kernel_layer(layer), std::cmp::Reverse(layer.size()), layer.index));
    }
    [(first, true), (kernel, true), (again, false)].map(|(layers, expected)| Round { layers, expected })
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
        ];
        let order = |read: &dyn Fn(&Layer) -> bool, complete| {
            let rounds = rounds(layers.iter(), read, complete);
            rounds.map(|round| (round.layers.iter().map(|layer| layer.index).collect::<Vec<_>>(), round.expected))
        };
        let kernels_wait = [(vec![3, 4, 1, 7], true), (vec![2, 5], true), (vec![], false)];
        assert_eq!(order(&|_| false, false), kernels_wait);
        assert_eq!(order(&|_| false, true), [(vec![3, 4, 1, 7, 2, 5], true), (vec![], true), (vec![], false)]);
        let two_read = |layer: &Layer| [2, 4].contains(&layer.index);
        assert_eq!(order(&two_read, false), [(vec![3, 1, 7], true), (vec![5], true), (vec![4, 2], false)]);
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
