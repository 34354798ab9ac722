//! Checks that a deployment cannot remove a system.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Returns true if the repo of `sysroot` is that of one of the `roots`, through whatever mount or link.
pub(crate) fn is_same_repo(sysroot: &Path, roots: &[impl AsRef<Path>]) -> bool {
    let id = |root: &Path| root.join("ostree/repo").metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    let repo = id(sysroot);
    repo.is_some() && roots.iter().any(|root| id(root.as_ref()) == repo)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

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
}
