//! The repo of the running system, for reading only.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ostree::gio;

use super::object::{ObjectId, ObjectSet, ObjectType, loose_path, read_metadata};
use super::place::is_bare;
use super::refs::{commit_of, layer_ref};

/// The booted system's repo and the booted commit.
#[derive(Debug, Clone)]
pub struct BootedRepo {
    /// Directory of the repo, normally `/ostree/repo`.
    pub path: PathBuf,
    /// Commit of the booted deployment, or `None` if it is unknown.
    pub commit: Option<ObjectId>,
}

impl BootedRepo {
    /// Returns the booted repo, or `None` on a system that ostree did not boot.
    ///
    /// libostree is asked first. A container that has `/run/ostree-booted` may lack the boot loader entries that libostree
    /// needs. Then the repo is searched in its usual places, and the commit is that of the deployment whose directory is
    /// the root directory.
    ///
    /// # Errors
    /// libostree reports a booted deployment, but the repo is in none of its usual places.
    pub fn discover() -> anyhow::Result<Option<Self>> {
        if !Path::new("/run/ostree-booted").exists() {
            return Ok(None);
        }
        let sysroot = ostree::Sysroot::new_default();
        if sysroot.load(gio::Cancellable::NONE).is_ok()
            && let Some(deployment) = sysroot.booted_deployment()
        {
            let path =
                usual_repo().context("cannot find the booted system's ostree repo: /ostree/repo does not exist")?;
            return Ok(Some(Self { path, commit: Some(deployment.csum().parse()?) }));
        }
        let Some(path) = usual_repo() else { return Ok(None) };
        let commit = ["/ostree/deploy", "/sysroot/ostree/deploy"].iter().find_map(|dir| running_commit(Path::new(dir)));
        Ok(Some(Self { path, commit }))
    }

    /// Returns true if the object exists in this repo. Its content is not checked.
    pub fn has(&self, id: &ObjectId, kind: ObjectType) -> bool {
        self.object_path(id, kind).symlink_metadata().is_ok()
    }

    /// Returns the content of a metadata object, or `None` if it is missing or damaged.
    pub fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        read_metadata(&self.path, id, kind)
    }

    /// Returns the path that the object has if it exists in this repo.
    pub fn object_path(&self, id: &ObjectId, kind: ObjectType) -> PathBuf {
        self.path.join(loose_path(id, kind))
    }

    /// Lists the content objects, by reading 256 directories. The set is empty if the repo does not have the mode `bare`.
    pub fn content_objects(&self) -> io::Result<ObjectSet> {
        if has_plain_files(&self.path) { list_content(&self.path) } else { Ok(ObjectSet::new()) }
    }

    /// Returns the commit of the layer's ref, or `None` if this repo has no such ref or a damaged one. The ref promises all
    /// objects of the layer.
    pub fn layer_commit(&self, digest: &str) -> Option<ObjectId> {
        commit_of(&self.path.join("refs/heads").join(layer_ref(digest)))
    }

    /// Returns true if this repo has a ref for the layer, and therefore all its objects.
    pub fn has_layer(&self, digest: &str) -> bool {
        self.path.join("refs/heads").join(layer_ref(digest)).is_file()
    }
}

fn usual_repo() -> Option<PathBuf> {
    ["/ostree/repo", "/sysroot/ostree/repo"].into_iter().map(PathBuf::from).find(|path| path.join("objects").is_dir())
}

/// Returns the commit of the deployment below `deploy` whose directory is the root directory. If none is (in a container
/// the root is a bind mount of another path), returns the commit of the only deployment.
fn running_commit(deploy: &Path) -> Option<ObjectId> {
    let root = std::fs::metadata("/").ok()?;
    let mut all = Vec::new();
    for stateroot in std::fs::read_dir(deploy).ok()?.flatten() {
        let Ok(deployments) = std::fs::read_dir(stateroot.path().join("deploy")) else { continue };
        for deployment in deployments.flatten() {
            let Some(commit) = deployment.file_name().to_str().and_then(commit_of_deployment) else { continue };
            if deployment.metadata().is_ok_and(|meta| meta.dev() == root.dev() && meta.ino() == root.ino()) {
                return Some(commit);
            }
            all.push(commit);
        }
    }
    match all.as_slice() {
        [only] => Some(*only),
        _ => None,
    }
}

/// Returns the commit of a deployment's directory, `COMMIT.SERIAL`, or `None` for other names, such as the origin file's.
fn commit_of_deployment(name: &str) -> Option<ObjectId> {
    let (commit, serial) = name.split_once('.')?;
    serial.parse::<u32>().ok().and_then(|_| commit.parse().ok())
}

/// Returns true if the files of content objects have the objects' owner, mode and attributes, as in a repo of mode
/// `bare`. Other modes store these elsewhere, for example in one attribute of a file with another owner.
pub(super) fn has_plain_files(repo: &Path) -> bool {
    std::fs::read_to_string(repo.join("config")).map_or(true, |config| is_bare(&config))
}

/// Lists all `.file` objects of a repo. Missing directories count as empty.
pub(super) fn list_content(repo: &Path) -> io::Result<ObjectSet> {
    let mut found = ObjectSet::with_capacity(32 * 1024);
    for prefix in 0..=255_u8 {
        let prefix = hex::encode([prefix]);
        let dir = support::if_found(std::fs::read_dir(repo.join("objects").join(&prefix)))?;
        for entry in dir.into_iter().flatten() {
            let name = entry?.file_name();
            if let Some(rest) = name.as_encoded_bytes().strip_suffix(b".file")
                && let Some(id) = ObjectId::from_parts(prefix.as_bytes(), rest)
            {
                found.insert(id);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_deployment_directory_names_a_commit() {
        let commit = "ab".repeat(32);
        assert_eq!(commit_of_deployment(&format!("{commit}.0")), Some(ObjectId([0xab; 32])));
        assert_eq!(commit_of_deployment(&format!("{commit}.0.origin")), None);
        assert_eq!(commit_of_deployment(&commit), None);
        assert_eq!(commit_of_deployment("backup.0"), None);
    }

    #[test]
    fn lists_content_and_layer_refs_only() {
        let temp = tempfile::tempdir().unwrap();
        let id = ObjectId([0xcd; 32]);
        let repo = BootedRepo { path: temp.path().to_owned(), commit: None };
        std::fs::create_dir_all(temp.path().join("objects/cd")).unwrap();
        std::fs::write(repo.object_path(&id, ObjectType::File), "").unwrap();
        std::fs::write(repo.object_path(&ObjectId([0xcd; 32]), ObjectType::DirTree), "").unwrap();
        std::fs::write(temp.path().join("objects/cd/junk.file"), "").unwrap();
        assert_eq!(repo.content_objects().unwrap(), ObjectSet::from([id]));
        assert!(repo.has(&id, ObjectType::File) && !repo.has(&id, ObjectType::DirMeta));
        assert!(!repo.has_layer("sha256:12"));
        std::fs::create_dir_all(temp.path().join("refs/heads/ostree/container/blob")).unwrap();
        std::fs::write(temp.path().join("refs/heads/ostree/container/blob/sha256_3A_12"), "x").unwrap();
        assert!(repo.has_layer("sha256:12"));
    }
}
