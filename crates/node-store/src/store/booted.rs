//! The repo of the running system, for reading only.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ostree::gio;
use ostree::glib::{Variant, VariantDict, VariantTy};

use super::object::{ObjectId, ObjectSet, ObjectType, loose_path, read_metadata};
use super::place::is_bare;
use super::refs::{commit_of, layer_ref};

/// Exists on systems that ostree booted.
const BOOTED_MARKER: &str = "/run/ostree-booted";

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
        if !Path::new(BOOTED_MARKER).exists() {
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
        let marker = std::fs::read(BOOTED_MARKER).unwrap_or_default();
        let places = ["/ostree/deploy", "/sysroot/ostree/deploy"];
        let commit = places.iter().find_map(|dir| running_commit(Path::new(dir), &marker));
        Ok(Some(Self { path, commit }))
    }

    /// Returns the composefs image in the directory from which the root was mounted.
    pub fn composefs_image(&self) -> Option<PathBuf> {
        let marker = std::fs::read(BOOTED_MARKER).ok()?;
        running_image(&self.path.parent()?.join("deploy"), &marker)
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

/// Returns the commit of the deployment below `deploy` whose directory is the root directory or, with a composefs root,
/// the one that the root was mounted from. If none is (in a container the root is a bind mount of another path), returns
/// the commit of the only deployment.
fn running_commit(deploy: &Path, marker: &[u8]) -> Option<ObjectId> {
    let root = std::fs::metadata("/").ok()?;
    let identities = [Some((root.dev(), root.ino())), backing_root(marker)];
    let all = deployments(deploy);
    let is_running =
        |path: &Path| path.metadata().is_ok_and(|meta| identities.contains(&Some((meta.dev(), meta.ino()))));
    match all.as_slice() {
        [(only, _)] => Some(*only),
        _ => all.iter().find(|(_, path)| is_running(path)).map(|(commit, _)| *commit),
    }
}

/// Returns the composefs image of the running deployment below `deploy`. Another deployment of the same commit can be
/// incomplete, changed, or removed before the switch.
fn running_image(deploy: &Path, marker: &[u8]) -> Option<PathBuf> {
    let root = backing_root(marker)?;
    let is_running = |path: &Path| path.metadata().is_ok_and(|meta| (meta.dev(), meta.ino()) == root);
    let (_, path) = deployments(deploy).into_iter().find(|(_, path)| is_running(path))?;
    Some(path.join(".ostree.cfs")).filter(|image| image.is_file())
}

/// Returns the commits and directories of all deployments below `deploy`.
pub fn deployments(deploy: &Path) -> Vec<(ObjectId, PathBuf)> {
    let stateroots = std::fs::read_dir(deploy).into_iter().flatten().flatten();
    let entries = stateroots.filter_map(|stateroot| std::fs::read_dir(stateroot.path().join("deploy")).ok());
    let named = |entry: std::fs::DirEntry| Some((commit_of_deployment(entry.file_name().to_str()?)?, entry.path()));
    entries.flatten().flatten().filter_map(named).collect()
}

/// Returns device and inode of the deployment of a composefs root, from the content of `/run/ostree-booted`. That file is
/// a serialized variant of the type `a{sv}`. It is empty if an old ostree or another program made it.
fn backing_root(marker: &[u8]) -> Option<(u64, u64)> {
    let facts = Variant::from_data_with_type(marker, VariantTy::VARDICT);
    VariantDict::new(Some(&facts)).lookup("backing-root-device-inode").ok().flatten()
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
    fn the_running_deployment_is_found_among_several_by_its_inode() {
        let temp = tempfile::tempdir().unwrap();
        let (deploy, commit) = (temp.path().join("ostree/deploy"), |byte| ObjectId([byte; 32]));
        let add = |byte, serial: u32| {
            let path = deploy.join(format!("os/deploy/{}.{serial}", commit(byte)));
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let marker = |path: &Path| {
            let meta = path.metadata().unwrap();
            let facts = VariantDict::new(None);
            facts.insert("composefs", true);
            facts.insert("backing-root-device-inode", (meta.dev(), meta.ino()));
            facts.end().data().to_vec()
        };
        let first = add(1, 0);
        assert_eq!(running_commit(&deploy, b""), Some(commit(1)), "the only one");
        let second = add(2, 1);
        assert_eq!(running_commit(&deploy, b""), None);
        assert_eq!(running_commit(&deploy, b"damaged"), None);
        for (path, byte) in [(&first, 1), (&second, 2)] {
            assert_eq!(running_commit(&deploy, &marker(path)), Some(commit(byte)));
        }
        assert_eq!(running_commit(&deploy, &marker(temp.path())), None, "the root of another system");

        let same = add(2, 0);
        for other in [&same, &second] {
            std::fs::write(other.join(".ostree.cfs"), "").unwrap();
            assert_eq!(running_image(&deploy, &marker(other)), Some(other.join(".ostree.cfs")));
        }
        assert_eq!(running_image(&deploy, &marker(&first)), None, "the image of another deployment");
        assert_eq!(running_image(&deploy, b""), None);
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
        assert!(!repo.has_layer("sha256:12"));
        std::fs::create_dir_all(temp.path().join("refs/heads/ostree/container/blob")).unwrap();
        std::fs::write(temp.path().join("refs/heads/ostree/container/blob/sha256_3A_12"), "x").unwrap();
        assert!(repo.has_layer("sha256:12"));
    }
}
