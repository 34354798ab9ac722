//! The node store: a bare repo of our own, its refs and its state.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::booted::list_content;
use super::object::{ObjectId, ObjectSet, ObjectType, loose_path};
use super::{BootedRepo, LayerJournal, LockError, NODE_IMAGE_REF, ObjectWriter, StoreLock};

/// A bare ostree repo at `ROOT/repo`, with what we keep beside it: `ROOT/lock`, `ROOT/layers` (the
/// layer journal), `ROOT/derived/` (what plain layers hold) and `ROOT/pulled.json`.
///
/// On a RAM store nothing is ever synced: a crash forgets all of it anyway. Objects appear under
/// their names only after their checksum was found right, so whatever is found there is good.
#[derive(Debug, Clone)]
pub struct NodeStore {
    root: PathBuf,
    repo: PathBuf,
    parent: Option<PathBuf>,
}

impl NodeStore {
    /// Creates the store below `root`, or takes the one that is there. With a parent, the repo's
    /// `core.parent` points at it, so that the ostree tools find there what we did not copy.
    ///
    /// `root` must exist and should be a tmpfs. A store that was made for another parent is refused.
    pub fn on_tmpfs(root: &Path, parent: Option<&BootedRepo>) -> anyhow::Result<Self> {
        let repo = root.join("repo");
        let parent = parent.map(|booted| booted.path.clone());
        if repo.join("config").exists() {
            let store = Self::open(root)?;
            ensure!(
                store.parent == parent,
                "the node store {} was made for the booted repo {:?}, not {:?}; remove it and try again",
                root.display(),
                store.parent,
                parent
            );
            return Ok(store);
        }
        for dir in ["refs/heads", "refs/mirrors", "refs/remotes", "state", "extensions", "tmp/cache"] {
            fs::create_dir_all(repo.join(dir))
                .with_context(|| format!("creating the node store {}", repo.display()))?;
        }
        for prefix in 0..=255_u8 {
            let dir = repo.join("objects").join(hex::encode([prefix]));
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let mut config = String::from("[core]\nrepo_version=1\nmode=bare\nfsync=false\n");
        if let Some(parent) = &parent {
            let parent = parent.to_str().context("the booted repo's path is not UTF-8")?;
            config.push_str(&format!("parent={parent}\n"));
        }
        // Last and in one step: a repo with a config is a whole repo.
        replace(&repo.join("config"), config.as_bytes()).context("writing the node store's config")?;
        Ok(Self { root: root.to_owned(), repo, parent })
    }

    /// Opens the store that an earlier run made below `root`.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let repo = root.join("repo");
        let config = fs::read_to_string(repo.join("config"))
            .with_context(|| format!("there is no node store at {}", root.display()))?;
        let parent = config.lines().find_map(|line| line.strip_prefix("parent=")).map(PathBuf::from);
        Ok(Self { root: root.to_owned(), repo, parent })
    }

    /// The directory that holds the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The repo, for the ostree tools.
    pub fn repo_path(&self) -> &Path {
        &self.repo
    }

    /// Where an object is, or would be, in this store's own repo.
    pub fn object_path(&self, id: &ObjectId, kind: ObjectType) -> PathBuf {
        self.repo.join(loose_path(id, kind))
    }

    /// Whether this store's own repo has the object.
    pub fn has(&self, id: &ObjectId, kind: ObjectType) -> bool {
        self.object_path(id, kind).symlink_metadata().is_ok()
    }

    /// Where the object is: here, or in the parent (the booted repo, maybe on another file system).
    pub fn find_object(&self, id: &ObjectId, kind: ObjectType) -> Option<PathBuf> {
        let here = self.object_path(id, kind);
        if here.symlink_metadata().is_ok() {
            return Some(here);
        }
        let there = self.parent.as_ref()?.join(loose_path(id, kind));
        there.symlink_metadata().is_ok().then_some(there)
    }

    /// A metadata object's bytes, from here or the parent; `None` when neither has it.
    pub fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        self.find_object(id, kind).map(fs::read).transpose()
    }

    /// The names of all content objects of this store's own repo.
    pub fn content_objects(&self) -> io::Result<ObjectSet> {
        list_content(&self.repo)
    }

    /// Writes objects into this store.
    pub fn writer(&self) -> io::Result<ObjectWriter> {
        ObjectWriter::new(&self.repo)
    }

    /// The commit that `coreos/node-image` names; `None` before the first pull is complete.
    pub fn resolve_ref(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.ref_path()) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Points `coreos/node-image` at a commit, in one step.
    pub fn set_ref(&self, commit: &str) -> io::Result<()> {
        let path = self.ref_path();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        replace(&path, format!("{commit}\n").as_bytes())
    }

    /// Removes `coreos/node-image`. None there is not an error.
    pub fn remove_ref(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.ref_path()))
    }

    /// Tells the ostree tools whether content of the commit was left out.
    pub fn mark_partial(&self, commit: &str, partial: bool) -> io::Result<()> {
        let path = self.repo.join("state").join(format!("{commit}.commitpartial"));
        // libostree reads the content too: 'f' would mean that fsck found the objects missing.
        if partial { fs::write(path, b"") } else { absent_is_fine(fs::remove_file(path)) }
    }

    /// Takes the import lock, or says who holds it. Leftovers of a killed import are removed then.
    pub fn lock(&self) -> Result<StoreLock, LockError> {
        let lock = StoreLock::try_acquire(&self.root.join("lock"))?;
        let tmp = self.repo.join("tmp");
        let tidy = || -> io::Result<()> {
            for entry in fs::read_dir(&tmp)? {
                let entry = entry?;
                if entry.file_name().as_encoded_bytes().starts_with(b"import-") {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        };
        tidy().map_err(|source| LockError::Io { path: tmp.display().to_string(), source })?;
        Ok(lock)
    }

    /// Removes a content object from this store's own repo. None there is not an error.
    pub fn remove_content(&self, id: &ObjectId) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.object_path(id, ObjectType::File)))
    }

    /// What an earlier run found in a plain layer, as [`NodeStore::write_layer_list`] left it.
    pub fn read_layer_list(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.root.join("derived").join(name)) {
            Ok(list) => Ok(Some(list)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps what was found in a plain layer, in one step. `name` is a plain file name.
    pub fn write_layer_list(&self, name: &str, list: &[u8]) -> io::Result<()> {
        let dir = self.root.join("derived");
        fs::create_dir_all(&dir)?;
        replace(&dir.join(name), list)
    }

    /// The journal of layers that are done.
    pub fn journal(&self) -> io::Result<LayerJournal> {
        LayerJournal::open(&self.root.join("layers"))
    }

    /// The record of the last complete pull, as [`NodeStore::write_record`] left it.
    pub fn read_record(&self) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.record_path()) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the record of the last complete pull, in one step.
    pub fn write_record(&self, record: &[u8]) -> io::Result<()> {
        replace(&self.record_path(), record)
    }

    /// Free and total bytes of the file system that the store is on.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(&self.repo)?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }

    fn ref_path(&self) -> PathBuf {
        self.repo.join("refs/heads").join(NODE_IMAGE_REF)
    }

    fn record_path(&self) -> PathBuf {
        self.root.join("pulled.json")
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Readers see the old content or the new, never half of it.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temp = path.with_extension("new");
    fs::write(&temp, content)?;
    fs::rename(&temp, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn libostree_opens_it_and_reads_its_refs() {
        let temp = tempfile::tempdir().unwrap();
        let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
        NodeStore::on_tmpfs(temp.path(), None).unwrap();
        let repo = ostree::Repo::new_for_path(store.repo_path());
        repo.open(ostree::gio::Cancellable::NONE).unwrap();
        assert_eq!(repo.mode(), ostree::RepoMode::Bare);
        assert_eq!(store.resolve_ref().unwrap(), None);
        let commit = "ab".repeat(32);
        store.set_ref(&commit).unwrap();
        assert_eq!(repo.resolve_rev(NODE_IMAGE_REF, false).unwrap().unwrap(), commit);
        assert_eq!(store.resolve_ref().unwrap(), Some(commit.clone()));
        store.mark_partial(&commit, true).unwrap();
        store.mark_partial(&commit, false).unwrap();
        store.mark_partial(&commit, false).unwrap();
        store.remove_ref().unwrap();
        store.remove_ref().unwrap();
    }

    #[test]
    fn parent_is_kept_and_another_one_refused() {
        let temp = tempfile::tempdir().unwrap();
        let booted = BootedRepo { path: "/ostree/repo".into(), commit: None };
        NodeStore::on_tmpfs(temp.path(), Some(&booted)).unwrap();
        assert_eq!(NodeStore::open(temp.path()).unwrap().parent.as_deref(), Some(Path::new("/ostree/repo")));
        assert!(NodeStore::on_tmpfs(temp.path(), None).is_err());
    }

    #[test]
    fn lock_tidies_leftovers() {
        let temp = tempfile::tempdir().unwrap();
        let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
        fs::write(store.repo_path().join("tmp/import-7"), "").unwrap();
        let _lock = store.lock().unwrap();
        assert!(!store.repo_path().join("tmp/import-7").exists());
        assert!(matches!(store.lock(), Err(LockError::Held { .. })));
    }
}
