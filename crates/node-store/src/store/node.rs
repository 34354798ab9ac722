//! The node store: a bare repo of our own, its refs and its state.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::booted::{has_plain_files, list_content};
use super::disk::Disk;
use super::object::{ObjectId, ObjectSet, ObjectType, loose_path, read_metadata};
use super::place::is_bare;
use super::{BootedRepo, LayerJournal, LockError, NODE_IMAGE_REF, ObjectWriter, StoreLock};
use support::directory::Directory;

/// The list of defaults in `/etc`, in our directory in the system's repo.
const ETC_DEFAULTS: &str = "etc-defaults.json";

/// Of a disk, this much is left to the system. libostree's default for `core.min-free-space-percent`, for
/// the same reason: a full disk stops more than us.
const RESERVE_PERCENT: u64 = 3;

/// A bare ostree repo, with what we keep beside it below a root: `layers` (the layer journal),
/// `derived/` (what plain layers hold), `pulled.json`, `usr` (the delta tree) and `lock`.
///
/// Objects get their names only after their checksum was found right, so whatever is found under one is
/// good. There are two kinds:
///
/// * The **RAM store** has a repo of its own at `ROOT/repo`. Nothing is ever synced: a crash forgets
///   all of it anyway.
/// * The **disk store** is the system's own repo, with all the rest in the repo's
///   `extensions/node-image-pivot/`. Others write to the repo, too: we hold libostree's lock while we
///   do. What a power cut finds half done is in `boot-ID` there, which the next boot removes; what is in
///   the repo itself had reached the disk before it got its name. `derived/` stays: whatever is in there
///   is compared with the objects that are there. So does `etc-defaults.json`, for the next boot's merge of `/etc`.
#[derive(Debug, Clone)]
pub struct NodeStore {
    root: PathBuf,
    repo: PathBuf,
    parent: Option<PathBuf>,
    parent_has_plain_files: bool,
    disk: Option<Disk>,
}

/// Names a booted repo for a message.
fn repo_named(repo: Option<&Path>) -> String {
    repo.map_or_else(|| "no booted repo".to_owned(), |path| format!("the booted repo {}", path.display()))
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
                "cannot use the node store {}: it was made for {}, and this system has {}; reboot to begin with an empty store",
                root.display(),
                repo_named(store.parent.as_deref()),
                repo_named(parent.as_deref())
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
        Ok(Self::in_ram(root, repo, parent))
    }

    /// The store in the system's repo, which is at `repo` for everybody. Where that cannot be written,
    /// `view` is the same directory on a mount that can.
    ///
    /// What an interrupted pull of an earlier boot left behind is removed.
    ///
    /// # Errors
    /// When it is no repo of mode `bare`, or cannot be written. Nothing that others see has changed.
    pub fn on_disk(repo: &Path, view: Option<OwnedFd>) -> anyhow::Result<Self> {
        let place = repo.display();
        let config =
            fs::read_to_string(repo.join("config")).with_context(|| format!("there is no ostree repo at {place}"))?;
        ensure!(is_bare(&config), "the ostree repo {place} is not of the mode bare; set store = \"ram\"");
        let disk = Disk::open(repo, view)
            .with_context(|| format!("the ostree repo {place} cannot be written; mend that, or set store = \"ram\""))?;
        Ok(Self {
            root: disk.volatile(),
            repo: disk.repo.clone(),
            parent: None,
            parent_has_plain_files: true,
            disk: Some(disk),
        })
    }

    /// Opens the RAM store that an earlier run made below `root`.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let repo = root.join("repo");
        let config = fs::read_to_string(repo.join("config"))
            .with_context(|| format!("there is no node store at {}", root.display()))?;
        let parent = config.lines().find_map(|line| line.strip_prefix("parent=")).map(PathBuf::from);
        Ok(Self::in_ram(root, repo, parent))
    }

    fn in_ram(root: &Path, repo: PathBuf, parent: Option<PathBuf>) -> Self {
        let parent_has_plain_files = parent.as_deref().is_none_or(has_plain_files);
        Self { root: root.to_owned(), repo, parent, parent_has_plain_files, disk: None }
    }

    /// Whether this is the system's repo.
    pub fn is_on_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// The directory for what we keep beside the repo.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The repo, for the ostree tools and for messages: on a disk store it may be read-only by this path.
    pub fn repo_path(&self) -> &Path {
        self.disk.as_ref().map_or(&self.repo, |disk| &disk.shown)
    }

    /// Where to build the delta tree, so that it can be hardlinked to [`NodeStore::object_path`].
    pub fn delta_build_path(&self) -> PathBuf {
        self.root.join("usr")
    }

    /// Where everybody finds the delta tree.
    pub fn delta_path(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.root.clone(), Disk::volatile_shown).join("usr")
    }

    /// Where an object is, or would be, in this store's own repo.
    pub fn object_path(&self, id: &ObjectId, kind: ObjectType) -> PathBuf {
        self.repo.join(loose_path(id, kind))
    }

    /// Whether this store's own repo has the object, or has it waiting for its name.
    pub fn has(&self, id: &ObjectId, kind: ObjectType) -> bool {
        self.own_object(id, kind).is_some()
    }

    /// Where the object is: here, or in the parent (the booted repo, maybe on another file system). Content of a parent
    /// that is not of mode `bare` does not count.
    pub fn find_object(&self, id: &ObjectId, kind: ObjectType) -> Option<PathBuf> {
        self.own_object(id, kind).or_else(|| {
            let found = there(self.parent.as_ref()?.join(loose_path(id, kind)))?;
            (kind != ObjectType::File || self.parent_has_plain_files).then_some(found)
        })
    }

    fn own_object(&self, id: &ObjectId, kind: ObjectType) -> Option<PathBuf> {
        self.repos().find_map(|repo| there(repo.join(loose_path(id, kind))))
    }

    /// Where this store's own objects are. One that waits for its name replaces a damaged one of that name.
    fn repos(&self) -> impl Iterator<Item = PathBuf> {
        self.disk.as_ref().map(Disk::incoming).into_iter().chain([self.repo.clone()])
    }

    /// Where objects are written to.
    fn incoming(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.repo.clone(), Disk::incoming)
    }

    /// A metadata object's bytes, from here or the parent; `None` if it is missing in both, or damaged.
    pub fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        for repo in self.repos().chain(self.parent.clone()) {
            if let Some(bytes) = read_metadata(&repo, id, kind)? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// The names of all content objects of this store's own repo, and of those that wait for theirs.
    pub fn content_objects(&self) -> io::Result<ObjectSet> {
        let mut found = list_content(&self.repo)?;
        if let Some(disk) = &self.disk {
            found.extend(list_content(&disk.incoming())?);
        }
        Ok(found)
    }

    /// Writes objects into this store.
    pub fn writer(&self) -> io::Result<ObjectWriter> {
        let room = match self.disk {
            Some(_) => {
                let (free, total) = self.space()?;
                free.saturating_sub(total * RESERVE_PERCENT / 100)
            }
            None => u64::MAX,
        };
        ObjectWriter::new(&self.incoming(), room)
    }

    /// The commit that `coreos/node-image` names; `None` before the first pull is complete.
    pub fn resolve_ref(&self) -> io::Result<Option<String>> {
        match fs::read_to_string(self.ref_path()) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends a pull: gives what was written its place in the repo, notes which commits lack content, and
    /// points `coreos/node-image` at the last of `commits`. Each comes with whether it is complete.
    ///
    /// On a disk store, every step is on the disk before the next one begins. Interrupted anywhere, the
    /// repo is consistent, and this can be called again; after a reboot, the pull has to be.
    pub fn publish(&self, commits: &[(ObjectId, bool)]) -> io::Result<()> {
        if let Some(disk) = &self.disk {
            // A commit that others can see must not miss anything unless it says so.
            for (commit, _) in commits {
                if there(self.object_path(commit, ObjectType::Commit)).is_none() {
                    self.mark_partial(commit, true)?;
                }
            }
            disk.sync()?;
            disk.give_names()?;
            disk.sync()?;
        }
        for (commit, complete) in commits {
            self.mark_partial(commit, !complete)?;
        }
        if let Some((commit, _)) = commits.last() {
            self.set_ref(&commit.to_string())?;
        }
        self.disk.as_ref().map_or(Ok(()), Disk::sync)
    }

    /// Points `coreos/node-image` at a commit, in one step.
    pub fn set_ref(&self, commit: &str) -> io::Result<()> {
        let path = self.ref_path();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        // Not beside it: whatever is below `refs` is a ref.
        let temp = self.root.join("ref.new");
        let mut file = fs::File::create(&temp)?;
        io::Write::write_all(&mut file, format!("{commit}\n").as_bytes())?;
        if self.disk.is_some() {
            file.sync_all()?;
        }
        fs::rename(&temp, &path)?;
        self.sync_refs()
    }

    /// Waits until a ref that was set or removed is so on the disk.
    fn sync_refs(&self) -> io::Result<()> {
        match self.ref_path().parent().map(fs::File::open) {
            Some(Ok(dir)) if self.disk.is_some() => dir.sync_all(),
            Some(Err(error)) => absent_is_fine(Err(error)),
            _ => Ok(()),
        }
    }

    /// Removes `coreos/node-image`. None there is not an error.
    pub fn remove_ref(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.ref_path()))?;
        self.sync_refs()
    }

    /// Gives the disk back what an unfinished pull wrote: the next one begins anew. A RAM store keeps it,
    /// nobody else suffers.
    ///
    /// # Errors
    /// As [`NodeStore::lock`]: a pull may still run.
    pub fn discard_unpublished(&self) -> Result<(), LockError> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let _lock = self.lock()?;
        let place = disk.volatile_shown().display().to_string();
        let discarded = absent_is_fine(fs::remove_file(self.root.join("layers"))).and_then(|()| disk.discard());
        discarded.map_err(|source| LockError::Io { path: place, source })
    }

    /// Removes what keeps the node image in the store: the ref, the delta tree, and what we know about
    /// layers. The next pull begins anew. Objects of the system's repo go when the system prunes it.
    ///
    /// Not while a mount uses the delta tree, or a pull runs.
    pub fn forget(&self) -> io::Result<()> {
        self.remove_ref()?;
        if let Some(disk) = &self.disk {
            return disk.forget();
        }
        absent_is_fine(fs::remove_dir_all(self.delta_build_path()))?;
        absent_is_fine(fs::remove_dir_all(self.root.join("derived")))?;
        absent_is_fine(fs::remove_file(self.root.join("layers")))?;
        absent_is_fine(fs::remove_file(self.record_path()))
    }

    /// Tells the ostree tools whether content of the commit was left out.
    fn mark_partial(&self, commit: &ObjectId, partial: bool) -> io::Result<()> {
        let path = self.repo.join("state").join(format!("{commit}.commitpartial"));
        // libostree reads the content too: 'f' would mean that fsck found the objects missing.
        if partial { fs::write(path, b"") } else { absent_is_fine(fs::remove_file(path)) }
    }

    /// Takes the import lock, on a disk store with libostree's own, or says who holds it. Leftovers of a
    /// killed import are removed then.
    pub fn lock(&self) -> Result<StoreLock, LockError> {
        let lock = match &self.disk {
            Some(disk) => StoreLock::try_acquire(&disk.kept().join("lock"))?.with_repo(&disk.repo, &disk.shown)?,
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

    /// Removes a content object that was written since the last [`NodeStore::publish`]. None there is
    /// not an error. In the system's repo itself nothing is ever removed: somebody else may rely on it.
    pub fn remove_content(&self, id: &ObjectId) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.incoming().join(loose_path(id, ObjectType::File))))
    }

    /// What an earlier run found in a plain layer, as [`NodeStore::write_layer_list`] left it.
    pub fn read_layer_list(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.lists().join(name)) {
            Ok(list) => Ok(Some(list)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps what was found in a plain layer, in one step. `name` is a plain file name.
    pub fn write_layer_list(&self, name: &str, list: &[u8]) -> io::Result<()> {
        let dir = self.lists();
        fs::create_dir_all(&dir)?;
        replace(&dir.join(name), list)
    }

    fn lists(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.root.clone(), Disk::kept).join("derived")
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

    /// The list of defaults in `/etc`, as [`NodeStore::write_etc_defaults`] left it, also in an earlier boot.
    pub fn read_etc_defaults(&self) -> io::Result<Option<Vec<u8>>> {
        let Some(disk) = &self.disk else { return Ok(None) };
        match fs::read(disk.kept().join(ETC_DEFAULTS)) {
            Ok(list) => Ok(Some(list)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps the list of the defaults in `/etc` that merges took from node images, or removes it. It is on the disk when
    /// this returns. A RAM store keeps none: the `/etc` of a live system does not outlive the boot either.
    pub fn write_etc_defaults(&self, list: Option<&[u8]>) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let dir = Directory::ensure(&disk.kept())?;
        match list {
            Some(list) => dir.write_durable(ETC_DEFAULTS, 0o600, list),
            None => dir.remove_all(ETC_DEFAULTS),
        }
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

fn there(path: PathBuf) -> Option<PathBuf> {
    path.symlink_metadata().is_ok().then_some(path)
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
mod tests;
