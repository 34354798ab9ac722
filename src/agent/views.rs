//! Finds services whose own mount namespace shows another `/usr` than PID 1's.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::new_usr::{USR, USR_SOURCE};
use crate::report;
use overlay_root::{Exposure, Namespace};

/// The `/usr` that services should see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// The node image's.
    NodeImage,
    /// The bootimage's.
    Bootimage,
}

impl Expected {
    /// Returns true if a namespace with this exposure of the node image's mount shows the other `/usr`.
    fn contradicts(self, exposure: Exposure) -> bool {
        match self {
            Expected::NodeImage => exposure != Exposure::OnTop,
            Expected::Bootimage => exposure == Exposure::OnTop,
        }
    }
}

/// Returns a line that names the services with a stale view, if there are any. systemd gives a service with
/// `ProtectSystem=` or `ReadOnlyPaths=` a bind mount of `/usr`, which later mounts on `/usr` do not reach.
pub(super) fn stale(expected: Expected) -> Option<String> {
    let units = stale_units(expected);
    let other = match expected {
        Expected::NodeImage => "bootimage",
        Expected::Bootimage => "node image",
    };
    let names = units.into_iter().collect::<Vec<_>>().join(", ");
    (!names.is_empty()).then(|| {
        format!("these services have their own mounts and see the {other}'s /usr until they are restarted: {names}")
    })
}

/// Returns true if a process has a mount of the node image's complete tree, or of a part of it. Containers count.
pub(super) fn shows_complete_tree() -> bool {
    let mut known = BTreeSet::new();
    processes().any(|(pid, process)| {
        let is_new = std::fs::read_link(process.join("ns/mnt")).is_ok_and(|namespace| known.insert(namespace));
        // The process may have ended meanwhile.
        is_new && Namespace::of(pid).mounts().is_ok_and(|all| all.iter().any(|mount| mount.shows_part_of(USR_SOURCE)))
    })
}

fn stale_units(expected: Expected) -> BTreeSet<String> {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
    let Some(here) = namespace(Path::new("/proc/1")) else { return BTreeSet::new() };
    let mut known: BTreeMap<PathBuf, bool> = BTreeMap::from([(here, false)]);
    let mut units = BTreeSet::new();
    for (pid, process) in processes() {
        // The process may have ended meanwhile.
        let Some(its) = namespace(&process) else { continue };
        let look = || {
            let exposure = Namespace::of(pid).exposure(Path::new(USR), USR_SOURCE);
            is_rooted_here(&process) && exposure.is_ok_and(|exposure| expected.contradicts(exposure))
        };
        if *known.entry(its).or_insert_with(look)
            && let Ok(cgroup) = std::fs::read_to_string(process.join("cgroup"))
        {
            units.extend(report::unit_of(&cgroup).map(str::to_owned));
        }
    }
    units
}

fn processes() -> impl Iterator<Item = (i32, PathBuf)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Returns true if a process has PID 1's root directory. Containers have another one, and their own `/usr`.
fn is_rooted_here(process: &Path) -> bool {
    let place = |root: &Path| std::fs::metadata(root).map(|root| (root.dev(), root.ino())).ok();
    place(&process.join("root")).is_some_and(|root| place(Path::new("/proc/1/root")) == Some(root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_stale_when_it_shows_the_other_usr() {
        use Exposure::{Absent, Covered, OnTop};
        for (exposure, after_switch, after_undo) in
            [(OnTop, false, true), (Covered, true, false), (Absent, true, false)]
        {
            assert_eq!(Expected::NodeImage.contradicts(exposure), after_switch, "{exposure:?}");
            assert_eq!(Expected::Bootimage.contradicts(exposure), after_undo, "{exposure:?}");
        }
    }
}
