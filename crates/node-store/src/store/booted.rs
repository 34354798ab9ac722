//! The repo of the running system: read, never written.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ostree::gio;

use super::object::{ObjectId, ObjectSet, ObjectType, loose_path, read_metadata};
use super::place::is_bare;
use super::refs::layer_ref;

/// The booted system's repo and the commit it runs.
#[derive(Debug, Clone)]
pub struct BootedRepo {
    /// The repo's directory, normally `/ostree/repo`.
    pub path: PathBuf,
    /// The booted deployment's commit, when it is known.
    pub commit: Option<String>,
}

impl BootedRepo {
    /// The booted repo: `None` on a system that ostree did not boot.
    ///
    /// libostree is asked first. Where it cannot say (a container that has `/run/ostree-booted` but
    /// not the boot loader entries that libostree wants), the repo is taken from its usual places and
    /// the commit from the deployment that the root directory is.
    pub fn discover() -> anyhow::Result<Option<Self>> {
        if !Path::new("/run/ostree-booted").exists() {
            return Ok(None);
        }
        let sysroot = ostree::Sysroot::new_default();
        if sysroot.load(gio::Cancellable::NONE).is_ok()
            && let Some(deployment) = sysroot.booted_deployment()
        {
            let path = usual_repo().context("booted by ostree, but there is no /ostree/repo")?;
            return Ok(Some(Self { path, commit: Some(deployment.csum().to_string()) }));
        }
        let Some(path) = usual_repo() else { return Ok(None) };
        let commit = ["/ostree/deploy", "/sysroot/ostree/deploy"].iter().find_map(|dir| running_commit(Path::new(dir)));
        Ok(Some(Self { path, commit }))
    }

    /// Whether the object is in this repo, by looking at its path.
    pub fn has(&self, id: &ObjectId, kind: ObjectType) -> bool {
        self.object_path(id, kind).symlink_metadata().is_ok()
    }

    /// A metadata object's bytes; `None` if it is missing or damaged.
    pub fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        read_metadata(&self.path, id, kind)
    }

    /// Where the object is, if it is here at all.
    pub fn object_path(&self, id: &ObjectId, kind: ObjectType) -> PathBuf {
        self.path.join(loose_path(id, kind))
    }

    /// The names of all content objects that are files of a system, by listing 256 directories.
    pub fn content_objects(&self) -> io::Result<ObjectSet> {
        if has_plain_files(&self.path) { list_content(&self.path) } else { Ok(ObjectSet::new()) }
    }

    /// Whether an import left a ref for this layer here, so that all its objects are here.
    pub fn has_layer(&self, digest: &str) -> bool {
        self.path.join("refs/heads").join(layer_ref(digest)).is_file()
    }
}

fn usual_repo() -> Option<PathBuf> {
    ["/ostree/repo", "/sysroot/ostree/repo"].into_iter().map(PathBuf::from).find(|path| path.join("objects").is_dir())
}

/// The commit of the deployment below `deploy` that is the root directory; when none is (a container
/// binds it elsewhere), the only one there is.
fn running_commit(deploy: &Path) -> Option<String> {
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
        [only] => Some(only.clone()),
        _ => None,
    }
}

/// `COMMIT.SERIAL` is a deployment's directory; its origin file beside it is not.
fn commit_of_deployment(name: &str) -> Option<String> {
    let (commit, serial) = name.split_once('.')?;
    (commit.parse::<ObjectId>().is_ok() && serial.parse::<u32>().is_ok()).then(|| commit.to_owned())
}

/// Returns true if content objects have their own owner, mode and attributes, as in a repo of mode `bare`. In other
/// modes these are kept elsewhere (in an attribute of a file of another owner, for example), so whatever reads the
/// files would take the wrong ones.
pub(super) fn has_plain_files(repo: &Path) -> bool {
    std::fs::read_to_string(repo.join("config")).map_or(true, |config| is_bare(&config))
}

/// The names of all `.file` objects of a repo. A directory that is missing holds none.
pub(super) fn list_content(repo: &Path) -> io::Result<ObjectSet> {
    let mut found = ObjectSet::with_capacity(32 * 1024);
    for prefix in 0..=255_u8 {
        let prefix = hex::encode([prefix]);
        let dir = match std::fs::read_dir(repo.join("objects").join(&prefix)) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in dir {
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
    fn deployment_names() {
        let commit = "ab".repeat(32);
        assert_eq!(commit_of_deployment(&format!("{commit}.0")), Some(commit.clone()));
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
