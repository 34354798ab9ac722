//! The node store: a bare repo and the agent's files beside it.

mod published;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};

use super::booted::{has_plain_files, list_content};
use super::disk::Disk;
use super::object::{ObjectId, ObjectSet, ObjectType, loose_path, read_metadata};
use super::place::is_bare;
use super::{BootedRepo, LayerJournal, LockError, ObjectWriter, StoreLock};
use support::directory::Directory;
use support::{BlockSize, if_found, ignore_missing, lock};

/// File name of the list of defaults in `/etc`, in the agent's directory in the system's repo.
const ETC_DEFAULTS: &str = "etc-defaults.json";

/// Share of a disk that stays free for the rest of the system: libostree's default for `core.min-free-space-percent`.
const RESERVE_PERCENT: u64 = 3;

/// A bare ostree repo, with the agent's files below a root: `layers` (the layer journal), `derived/` (lists of the content
/// of layers), `pulled.json`, `usr` (the delta tree) and `lock`.
///
/// A content object gets its name only after its checksum was compared with the name. There are two kinds of store:
///
/// * The **RAM store** has a separate repo at `ROOT/repo`. It is never synced, because it does not outlive a crash.
/// * The **disk store** is the system's repo. The agent's files are in its `extensions/node-image-pivot/`. Other programs
///   write to the repo, too, so the agent holds libostree's lock while it writes. Unfinished work is in `boot-ID`, which
///   the next boot removes. An object reaches the disk before it gets its name in the repo. Two entries stay after a
///   reboot: `derived/`, which each pull compares with the existing objects, and `etc-defaults.json`, for the next
///   merge of `/etc`.
#[derive(Debug, Clone)]
pub struct NodeStore {
    root: PathBuf,
    repo: PathBuf,
    parent: Option<PathBuf>,
    parent_has_plain_files: bool,
    disk: Option<Disk>,
}

/// Returns a booted repo's name for a message.
fn describe_booted(repo: Option<&Path>) -> String {
    repo.map_or_else(|| "no booted repo".to_owned(), |path| format!("the booted repo {}", path.display()))
}

impl NodeStore {
    /// Creates the RAM store below `root`, or opens an existing one. The repo's `core.parent` is the parent, so that the
    /// ostree tools find the objects there that a pull does not copy.
    ///
    /// `root` must exist and should be a tmpfs.
    ///
    /// # Errors
    /// The store exists and was created for another parent, or a file cannot be written.
    pub fn on_tmpfs(root: &Path, parent: Option<&BootedRepo>) -> anyhow::Result<Self> {
        let repo = root.join("repo");
        let parent = parent.map(|booted| booted.path.clone());
        if repo.join("config").exists() {
            let store = Self::open(root)?;
            ensure!(
                store.parent == parent,
                "cannot use the node store {}: it was created for {}, but this system has {}; reboot to start with an empty store",
                root.display(),
                describe_booted(store.parent.as_deref()),
                describe_booted(parent.as_deref())
            );
            return Ok(store);
        }
        for dir in ["refs/heads", "refs/mirrors", "refs/remotes", "state", "extensions", "tmp/cache"] {
            fs::create_dir_all(repo.join(dir))
                .with_context(|| format!("cannot create the node store {}", repo.display()))?;
        }
        for prefix in 0..=255_u8 {
            let dir = repo.join("objects").join(hex::encode([prefix]));
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let mut config = String::from("[core]\nrepo_version=1\nmode=bare\nfsync=false\n");
        if let Some(parent) = &parent {
            let parent = parent.to_str().context("cannot use the booted repo: its path is not UTF-8")?;
            config.push_str(&format!("parent={parent}\n"));
        }
        // Last and atomically: a repo with a config counts as complete.
        replace(&repo.join("config"), config.as_bytes()).context("cannot write the node store's config")?;
        Ok(Self::in_ram(root, repo, parent))
    }

    /// Opens the disk store in the system's repo at `repo`. If the mount of `repo` is read-only, `view` is the same
    /// directory on a writable mount. Removes the files of a pull that an earlier boot did not finish.
    ///
    /// # Errors
    /// The repo does not have the mode `bare`, or is not writable. Its objects and refs are unchanged.
    pub fn on_disk(repo: &Path, view: Option<OwnedFd>) -> anyhow::Result<Self> {
        let place = repo.display();
        let config = fs::read_to_string(repo.join("config"))
            .with_context(|| format!("cannot read the config of the ostree repo {place}"))?;
        ensure!(
            is_bare(&config),
            "cannot use the ostree repo {place}: it does not have the mode bare; set store = \"ram\""
        );
        let disk = Disk::open(repo, view).with_context(|| {
            format!("cannot write to the ostree repo {place}; make it writable, or set store = \"ram\"")
        })?;
        Ok(Self {
            root: disk.volatile(),
            repo: disk.repo.clone(),
            parent: None,
            parent_has_plain_files: true,
            disk: Some(disk),
        })
    }

    /// Opens an existing RAM store below `root`.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let repo = root.join("repo");
        let config = fs::read_to_string(repo.join("config"))
            .with_context(|| format!("cannot open the node store {}", root.display()))?;
        let parent = config.lines().find_map(|line| line.strip_prefix("parent=")).map(PathBuf::from);
        Ok(Self::in_ram(root, repo, parent))
    }

    fn in_ram(root: &Path, repo: PathBuf, parent: Option<PathBuf>) -> Self {
        let parent_has_plain_files = parent.as_deref().is_none_or(has_plain_files);
        Self { root: root.to_owned(), repo, parent, parent_has_plain_files, disk: None }
    }

    /// Returns true if this is the disk store.
    pub fn is_on_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Returns the directory of the agent's files.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the repo's path for the ostree tools and for messages. In a disk store this path may be read-only.
    pub fn repo_path(&self) -> &Path {
        self.disk.as_ref().map_or(&self.repo, |disk| &disk.public_path)
    }

    /// Returns the path for building the delta tree. It is on the same mount as [`NodeStore::object_path`], so that hard
    /// links work.
    pub fn delta_build_path(&self) -> PathBuf {
        self.root.join("usr")
    }

    /// Returns the path of the delta tree for all other processes.
    pub fn delta_path(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.root.clone(), Disk::volatile_public_path).join("usr")
    }

    /// Returns the path for building the complete tree of the node image's `/usr`, beside the delta tree.
    pub fn complete_build_path(&self) -> PathBuf {
        self.root.join("node-image")
    }

    /// Removes the complete tree, because there may not be room for two. The caller makes sure that no mount uses it.
    pub fn discard_complete(&self) -> io::Result<()> {
        ignore_missing(fs::remove_dir_all(self.complete_build_path()))
    }

    /// Returns the path that a published object has in this store's repo.
    pub fn object_path(&self, id: &ObjectId, kind: ObjectType) -> PathBuf {
        self.repo.join(loose_path(id, kind))
    }

    /// Returns true if the object is in this store's repo, or pending.
    pub fn has(&self, id: &ObjectId, kind: ObjectType) -> bool {
        self.own_object(id, kind).is_some()
    }

    /// Returns the path of an existing object in this store or in the parent (the booted repo, possibly on another file
    /// system). Content of a parent without the mode `bare` is ignored.
    pub fn find_object(&self, id: &ObjectId, kind: ObjectType) -> Option<PathBuf> {
        self.own_object(id, kind).or_else(|| {
            let found = existing(self.parent.as_ref()?.join(loose_path(id, kind)))?;
            (kind != ObjectType::File || self.parent_has_plain_files).then_some(found)
        })
    }

    /// Returns the path of an existing object in this store's repo, possibly a pending one.
    pub fn own_object(&self, id: &ObjectId, kind: ObjectType) -> Option<PathBuf> {
        self.repos().find_map(|repo| existing(repo.join(loose_path(id, kind))))
    }

    /// Returns the directories of this store's objects. Pending objects are first, because they replace damaged ones.
    fn repos(&self) -> impl Iterator<Item = PathBuf> {
        self.disk.as_ref().map(Disk::incoming).into_iter().chain([self.repo.clone()])
    }

    /// Returns the directory to which objects are written.
    fn incoming(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.repo.clone(), Disk::incoming)
    }

    /// Returns the content of a metadata object of this store or the parent, or `None` if it is missing or damaged in both.
    pub fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        for repo in self.repos().chain(self.parent.clone()) {
            if let Some(bytes) = read_metadata(&repo, id, kind)? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Returns the content of a metadata object of this store or the parent.
    ///
    /// # Errors
    /// The object cannot be read, or is missing or damaged in both.
    pub fn load_metadata(&self, id: &ObjectId, kind: ObjectType) -> anyhow::Result<Vec<u8>> {
        let read = self.read_metadata(id, kind).map_err(anyhow::Error::from);
        let found =
            read.and_then(|bytes| bytes.context("it is missing or damaged in the node store and the booted repo"));
        found.with_context(|| format!("cannot read the object {id}.{}", kind.extension()))
    }

    /// Returns the size of a content object of this store or the parent. For a link, this is the length of its target.
    ///
    /// # Errors
    /// The object cannot be read, or is in neither.
    pub fn content_size(&self, id: &ObjectId) -> anyhow::Result<u64> {
        Ok(self.content(id)?.1.len())
    }

    /// Returns the path of an existing content object in this store or in the parent.
    ///
    /// # Errors
    /// As [`NodeStore::content_size`].
    pub fn find_content(&self, id: &ObjectId) -> anyhow::Result<PathBuf> {
        Ok(self.content(id)?.0)
    }

    fn content(&self, id: &ObjectId) -> anyhow::Result<(PathBuf, fs::Metadata)> {
        for repo in self.repos().chain(self.parent.clone()) {
            let path = repo.join(loose_path(id, ObjectType::File));
            let found = if_found(path.symlink_metadata());
            if let Some(meta) = found.with_context(|| format!("cannot read {}", path.display()))? {
                return Ok((path, meta));
            }
        }
        bail!("cannot find the content object {id} in the node store and the booted repo")
    }

    /// Lists the content objects of this store's repo, including pending ones.
    pub fn content_objects(&self) -> io::Result<ObjectSet> {
        let mut found = list_content(&self.repo)?;
        if let Some(disk) = &self.disk {
            found.extend(list_content(&disk.incoming())?);
        }
        Ok(found)
    }

    /// Returns a writer of objects. In a disk store, it stops before the reserve of free space is used.
    pub fn writer(&self) -> io::Result<ObjectWriter> {
        let limit = match self.disk {
            Some(_) => {
                let (free, total) = self.space()?;
                free.saturating_sub(total * RESERVE_PERCENT / 100)
            }
            None => u64::MAX,
        };
        ObjectWriter::new(&self.incoming(), limit)
    }

    /// Removes the pending objects of an unfinished pull from a disk store, so that the next pull starts from the
    /// beginning. A RAM store keeps them, because they do not use the system's disk.
    ///
    /// # Errors
    /// Those of [`NodeStore::lock`]: a pull may still be running.
    pub fn discard_unpublished(&self) -> Result<(), LockError> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let _lock = self.lock()?;
        let place = disk.volatile_public_path().display().to_string();
        let discarded = ignore_missing(fs::remove_file(self.root.join("layers"))).and_then(|()| disk.discard());
        discarded.map_err(|source| LockError::Io { path: place, source })
    }

    /// Takes the import lock and, in a disk store, libostree's lock of the repo. Then removes the temporary files of a
    /// killed import. Does not wait.
    ///
    /// # Errors
    /// [`LockError::Held`] names the process that holds a lock.
    pub fn lock(&self) -> Result<StoreLock, LockError> {
        let lock = match &self.disk {
            Some(disk) => {
                StoreLock::try_acquire(&disk.kept().join("lock"))?.with_repo(&disk.repo, &disk.public_path)?
            }
            None => StoreLock::try_acquire(&self.root.join("lock"))?,
        };
        let tmp = self.incoming().join("tmp");
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

    /// Removes a content object that was written since the last [`NodeStore::publish`], if it exists, and returns it to
    /// the limit of `writer`. Published objects of a disk store are never removed, because other commits may contain them.
    pub fn remove_content(&self, id: &ObjectId, writer: &ObjectWriter) -> io::Result<()> {
        let path = self.incoming().join(loose_path(id, ObjectType::File));
        if let Some(meta) = if_found(path.symlink_metadata())? {
            ignore_missing(fs::remove_file(path))?;
            writer.removed(&meta);
        }
        Ok(())
    }

    /// Returns true if no commit can have the content object: in a disk store because it is pending, in a RAM store because
    /// nothing was ever published.
    pub(crate) fn is_pending(&self, id: &ObjectId) -> bool {
        match &self.disk {
            Some(disk) => existing(disk.incoming().join(loose_path(id, ObjectType::File))).is_some(),
            None => fs::read_dir(self.heads()).is_ok_and(|mut refs| refs.next().is_none()),
        }
    }

    /// Returns the list of a layer's content from [`NodeStore::write_layer_list`], or `None` if there is none or a power cut
    /// damaged it.
    pub fn read_layer_list(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let mut list = if_found(fs::read(self.lists().join(name)))?.unwrap_or_default();
        let digest = list.split_off(list.len().saturating_sub(32));
        Ok((Sha256::digest(&list)[..] == digest).then_some(list))
    }

    /// Stores the list of a layer's content and its digest, atomically. A power cut of a machine with a disk store may still
    /// leave a part of it. `name` is a file name without directories.
    pub fn write_layer_list(&self, name: &str, mut list: Vec<u8>) -> io::Result<()> {
        let dir = self.lists();
        fs::create_dir_all(&dir)?;
        list.extend(Sha256::digest(&list));
        replace(&dir.join(name), &list)
    }

    /// Returns the file that lists the objects of plain layers of which only relabelled copies are left.
    pub(crate) fn replaced_list(&self) -> PathBuf {
        self.lists().join("replaced")
    }

    fn lists(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.root.clone(), Disk::kept).join("derived")
    }

    /// Opens the journal of finished layers.
    pub fn journal(&self) -> io::Result<LayerJournal> {
        LayerJournal::open(&self.root.join("layers"))
    }

    /// Returns the record of the last complete pull from [`NodeStore::write_record`], or `None` if there is none.
    pub fn read_record(&self) -> io::Result<Option<Vec<u8>>> {
        if_found(fs::read(self.record_path()))
    }

    /// Replaces the record of the last complete pull, atomically.
    pub fn write_record(&self, record: &[u8]) -> io::Result<()> {
        replace(&self.record_path(), record)
    }

    /// Returns the list of defaults in `/etc` from [`NodeStore::write_etc_defaults`] of this or an earlier boot.
    pub fn read_etc_defaults(&self) -> io::Result<Option<Vec<u8>>> {
        let Some(disk) = &self.disk else { return Ok(None) };
        if_found(fs::read(disk.kept().join(ETC_DEFAULTS)))
    }

    /// Stores or removes the list of the defaults in `/etc` that merges copied from node images. The change is on the disk
    /// when this returns. A RAM store ignores the list, because the `/etc` of a live system does not outlive the boot.
    pub fn write_etc_defaults(&self, list: Option<&[u8]>) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let dir = Directory::ensure(&disk.kept())?;
        match list {
            Some(list) => dir.write_durable(ETC_DEFAULTS, 0o600, list),
            None => dir.remove_all(ETC_DEFAULTS),
        }
    }

    /// Returns the free and the total bytes of the store's file system.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(&self.repo)?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }

    /// Returns the unit in which the store's file system allocates space; a memory page if it is unknown.
    pub fn block_size(&self) -> BlockSize {
        BlockSize::at(&self.repo).unwrap_or_else(|_| BlockSize::page())
    }

    fn record_path(&self) -> PathBuf {
        self.root.join("pulled.json")
    }
}

fn existing(path: PathBuf) -> Option<PathBuf> {
    path.symlink_metadata().is_ok().then_some(path)
}

/// Replaces a file atomically: a reader gets the old or the new content.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    // An image may have the same layer twice, and both reads write the list of its content.
    static WRITER: Mutex<()> = Mutex::new(());
    let _writer = lock(&WRITER);
    let temp = path.with_extension("new");
    fs::write(&temp, content)?;
    fs::rename(&temp, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
