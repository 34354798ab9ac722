//! Checks that a deployment cannot remove a system: libostree removes all deployments that it does not find.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use node_store::store::{ObjectId, deployments};

/// Returns true if the repo of `sysroot` is that of one of the `roots`, through whatever mount or link.
pub(crate) fn is_same_repo(sysroot: &Path, roots: &[impl AsRef<Path>]) -> bool {
    let id = |root: &Path| root.join("ostree/repo").metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    let repo = id(sysroot);
    repo.is_some() && roots.iter().any(|root| id(root.as_ref()) == repo)
}

/// Returns a deployment that the boot loader entries may name, for a sysroot in which libostree finds no entries.
/// Deployments of `commit` may be the rest of a killed call. If so, and if `boot.N` names them, `/boot` has their kernel.
pub(crate) fn unlisted(sysroot: &Path, commit: &ObjectId) -> Option<PathBuf> {
    let has_links =
        ["boot.0", "boot.1"].iter().any(|name| sysroot.join("ostree").join(name).symlink_metadata().is_ok());
    let is_rest = !has_links || sysroot.join("boot/ostree").is_dir();
    let mut all = deployments(&sysroot.join("ostree/deploy")).into_iter();
    all.find(|(other, _)| other != commit || !is_rest).map(|(_, path)| path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_repo_of_the_running_system_is_found_under_another_path() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        for name in ["running/ostree/repo", "disk/ostree/repo", "empty"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        std::os::unix::fs::symlink("running", path("alias")).unwrap();
        let roots = [path("missing"), path("running")];
        for (sysroot, expected) in
            [("running", true), ("alias", true), ("disk", false), ("empty", false), ("no", false)]
        {
            assert_eq!(is_same_repo(&path(sysroot), &roots), expected, "{sysroot}");
        }
    }

    #[test]
    fn a_deployment_without_boot_loader_entries_is_found() {
        let (commit, other) = (ObjectId([0xab; 32]), ObjectId([0xcd; 32]));
        let dir = |id: &ObjectId| format!("ostree/deploy/os/deploy/{id}.0");
        let origin = format!("ostree/deploy/os/deploy/{other}.0.origin");
        for (paths, expected) in [
            (vec!["ostree/deploy/os/var".to_owned(), origin], false),
            (vec![dir(&commit)], false),
            (vec![dir(&other)], true),
            (vec![dir(&commit), dir(&other)], true),
            (vec![dir(&commit), "ostree/boot.1".into()], true),
            (vec![dir(&commit), "ostree/boot.1".into(), "boot/ostree".into()], false),
        ] {
            let temp = tempfile::tempdir().unwrap();
            paths.iter().for_each(|path| fs::create_dir_all(temp.path().join(path)).unwrap());
            assert_eq!(unlisted(temp.path(), &commit).is_some(), expected, "{paths:?}");
        }
    }
}
