//! The node image's `/usr`: its place, its name in mount tables, its defaults for `/etc`, and the paths that it changes.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};

use node_store::store::BootedRepo;
use overlay_root::Composefs;
use overlay_root::delta::{Delta, DeltaLookup};

/// Source that mount tables show for the exposed `/usr`.
pub(super) const USR_SOURCE: &str = "node-image";
/// Mount point of the node image's tree.
pub(super) const USR: &str = "/usr";
/// Directory that the switch merges.
pub(super) const ETC: &str = "/etc";

/// Opens the node image's defaults for `/etc`: the directory `etc` of its `usr`.
///
/// # Errors
/// The image is not an ostree system, or the directory cannot be opened.
pub(super) fn new_etc(usr: BorrowedFd<'_>) -> Result<OwnedFd> {
    etc_merge::open_defaults(usr)?
        .context("the node image has no /usr/etc: it is not an ostree system; use another node image")
}

/// Finds the image from which ostree mounted the booted composefs root.
///
/// # Errors
/// The running deployment is unknown, or has no image.
pub(super) fn composefs_image() -> Result<Composefs> {
    let booted = BootedRepo::discover()?.context("this system was not booted from an ostree deployment")?;
    let repo = booted.path.canonicalize().with_context(|| format!("cannot find {}", booted.path.display()))?;
    let path = booted.composefs_image().context("the running deployment is unknown or has no .ostree.cfs")?;
    let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
    Ok(Composefs { path, objects: repo.join("objects") })
}

/// Paths of `/usr` that differ between the bootimage and the node image. A path whose state is unknown counts as changed:
/// a needless restart is the smaller mistake.
pub(super) struct ChangedPaths(Option<DeltaLookup>);

impl ChangedPaths {
    /// Opens the delta tree, which holds exactly the paths that differ.
    pub(super) fn of(delta: &Delta) -> Result<Self> {
        Ok(Self(Some(delta.lookup()?)))
    }

    /// Opens the delta tree. If that fails, all paths count as changed and the error is returned beside.
    pub(super) fn or_all(delta: &Delta) -> (Self, Option<anyhow::Error>) {
        match delta.lookup() {
            Ok(lookup) => (Self(Some(lookup)), None),
            Err(error) => (Self(None), Some(error)),
        }
    }

    /// Returns true if `path`, relative to `/usr`, differs.
    pub(super) fn contains(&self, path: &Path) -> bool {
        self.0.as_ref().is_none_or(|delta| delta.contains(path).unwrap_or(true))
    }
}
