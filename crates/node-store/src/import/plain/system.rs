//! Rules for the tree of a plain image, which no ostree tool has built before. Pure, except that it reads metadata objects.

use crate::image::{Failure, Kind, PullSpec};

use super::layertree::{LayerFile, LayerTree};
use super::merge::Dir;
use crate::import::tree::{Lookup, TreeError};
use crate::store::ObjectId;

/// Files that every operating system has.
const REQUIRED: [&str; 2] = ["usr/lib/os-release", "usr/lib/systemd/systemd"];

/// Files of `/etc` that a build of the image mounts over. It leaves an empty file in the layer (buildah issue 4242).
const MOUNTED: [&str; 2] = ["resolv.conf", "hostname"];

/// Removes the files that a build of the image left behind, after the hardlinks of the layer are resolved. `is_empty`
/// returns true for the object of an empty regular file.
pub(super) fn remove_left_by_build(tree: &mut LayerTree, is_empty: &dyn Fn(&ObjectId) -> bool) {
    let Some(etc) = tree.existing(&["usr", "etc"].map(str::to_owned)) else { return };
    for name in MOUNTED {
        if matches!(etc.files.get(name), Some(LayerFile::Object(id)) if is_empty(id)) {
            etc.files.remove(name);
        }
    }
}

/// Returns the first file that an operating system has and the tree lacks.
pub(super) fn missing_file(root: &mut Dir, lookup: &mut Lookup<'_>) -> Result<Option<&'static str>, TreeError> {
    for path in REQUIRED {
        let parts: Vec<String> = path.split('/').map(str::to_owned).collect();
        if root.file(&parts, lookup)?.is_none() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Returns the failure of an image that is not an operating system.
pub(super) fn not_a_system(image: &PullSpec, missing: &str) -> Failure {
    const ADVICE: &str = "use the image of an operating system as node image";
    let message = format!("the image {image} is not an operating system: it has no /{missing}");
    Failure { advice: ADVICE, ..Failure::new(Kind::BadFormat, message) }
}

/// Returns the failure of an image without an active policy if its files were labelled by another one.
pub(super) fn no_policy(image: &PullSpec) -> Failure {
    const ADVICE: &str = "use a node image with an enabled SELinux policy";
    let message = format!(
        "the image {image} has no SELinux policy that /etc/selinux/config enables, but the booted system or a \
         layer has one"
    );
    Failure { advice: ADVICE, ..Failure::new(Kind::BadFormat, message) }
}
