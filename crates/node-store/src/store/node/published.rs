//! The refs of the node store's repo, the marks of partial commits, and the end of a pull, which sets both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::NODE_IMAGE_REF;
use super::super::booted::BootedRepo;
use super::super::disk::Disk;
use super::super::object::{ObjectId, ObjectType};
use super::super::refs::is_layer_ref;
use super::{NodeStore, existing, replace};
use support::{if_found, ignore_missing};

/// File with the names of the refs of layers that an incomplete pull set.
const LAYER_REFS: &str = "layer-refs";

impl NodeStore {
    /// Returns the commit of the ref `coreos/node-image`, or `None` before the first pull is complete and for a
    /// damaged ref.
    pub fn resolve_ref(&self) -> io::Result<Option<ObjectId>> {
        self.resolve(NODE_IMAGE_REF)
    }

    /// Returns the commit of a ref of this store's repo, or `None` if the ref is missing or damaged.
    pub fn resolve(&self, name: &str) -> io::Result<Option<ObjectId>> {
        Ok(if_found(fs::read_to_string(self.heads().join(name)))?.and_then(|text| text.trim().parse().ok()))
    }

    /// Returns true if the commit is marked as partial in this store's repo or in the parent.
    pub fn is_partial(&self, commit: &ObjectId) -> bool {
        let marked = |repo: &PathBuf| partial_mark(repo, commit).exists();
        marked(&self.repo) || self.parent.as_ref().is_some_and(marked)
    }

    /// Ends a pull: publishes the pending objects, marks incomplete commits as partial, and sets the ref
    /// `coreos/node-image` to the last of `commits`. The flag of a commit is true if it is complete. `refs` are further
    /// refs to complete commits, in the order in which they are set. Those of an incomplete pull are removed by the next pull of
    /// another image, or with the ref `coreos/node-image`.
    ///
    /// In a disk store, each step is on the disk before the next one begins. After an error the repo is consistent, and
    /// the caller may call this again. After a reboot, the pull must be repeated.
    pub fn publish(&self, commits: &[(ObjectId, bool)], refs: &[(String, ObjectId)]) -> io::Result<()> {
        let complete = commits.iter().all(|(_, complete)| *complete);
        if let Some(disk) = &self.disk {
            if !complete {
                self.list_layer_refs(disk, refs)?;
            }
            // Another process must not find an incomplete commit that is not marked as partial.
            for (commit, _) in commits {
                if existing(self.object_path(commit, ObjectType::Commit)).is_none() {
                    self.mark_partial(commit, true)?;
                }
            }
            disk.sync()?;
            disk.publish_objects()?;
            disk.sync()?;
        }
        for (commit, complete) in commits {
            self.mark_partial(commit, !complete)?;
        }
        self.set_refs(refs.iter().map(|(name, commit)| (name.as_str(), commit)))?;
        if let Some((commit, _)) = commits.last() {
            self.set_ref(commit)?;
        }
        self.remove_listed_refs(if complete { &[] } else { refs }, refs)?;
        self.disk.as_ref().map_or(Ok(()), Disk::sync)
    }

    /// Sets refs to complete commits, in this order, each atomically.
    pub(crate) fn set_refs<'a>(&self, refs: impl IntoIterator<Item = (&'a str, &'a ObjectId)>) -> io::Result<()> {
        refs.into_iter().try_for_each(|(name, commit)| self.write_ref(name, commit))
    }

    /// Sets the ref `coreos/node-image` to a commit, atomically.
    pub fn set_ref(&self, commit: &ObjectId) -> io::Result<()> {
        self.write_ref(NODE_IMAGE_REF, commit)?;
        self.sync_refs()
    }

    fn write_ref(&self, name: &str, commit: &ObjectId) -> io::Result<()> {
        let path = self.heads().join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        // In another directory: every file below `refs` is a ref.
        let temp = self.root.join("ref.new");
        let mut file = fs::File::create(&temp)?;
        io::Write::write_all(&mut file, format!("{commit}\n").as_bytes())?;
        if self.disk.is_some() {
            file.sync_all()?;
        }
        fs::rename(&temp, &path)
    }

    /// Syncs the directory of the ref in a disk store, after the ref was set or removed.
    fn sync_refs(&self) -> io::Result<()> {
        match self.ref_path().parent().map(fs::File::open) {
            Some(Ok(dir)) if self.disk.is_some() => dir.sync_all(),
            Some(Err(error)) => ignore_missing(Err(error)),
            _ => Ok(()),
        }
    }

    /// Removes the ref `coreos/node-image`, if it exists, and the refs of layers that an incomplete pull set and no image uses,
    /// so that ostree can remove their objects.
    pub fn remove_ref(&self) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.ref_path()))?;
        self.remove_listed_refs(&[], &[])?;
        self.sync_refs()
    }

    /// Adds refs of an incomplete pull to the list of those that the next pull or [`NodeStore::remove_ref`] removes.
    fn list_layer_refs(&self, disk: &Disk, refs: &[(String, ObjectId)]) -> io::Result<()> {
        let mut names = listed_refs(disk)?;
        // A ref that exists may be that of a deployed image.
        names.extend(refs.iter().map(|(name, _)| name).filter(|name| !self.heads().join(name).exists()).cloned());
        replace(&disk.kept().join(LAYER_REFS), names.join("\n").as_bytes())
    }

    /// Removes the listed refs that are not in `needed` and that no image uses. Those in `temporary` stay in the list.
    fn remove_listed_refs(&self, temporary: &[(String, ObjectId)], needed: &[(String, ObjectId)]) -> io::Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let listed = listed_refs(disk)?;
        if listed.is_empty() {
            return Ok(());
        }
        let has = |refs: &[(String, ObjectId)], name: &String| refs.iter().any(|(other, _)| other == name);
        // Another program may have imported an image with these layers meanwhile.
        let used = BootedRepo { path: self.repo.clone(), commit: None }.held_layers().refs();
        let unused = listed.iter().filter(|name| !used.contains(*name) && !has(needed, name));
        unused.map(|name| fs::remove_file(self.heads().join(name))).try_for_each(ignore_missing)?;
        let path = disk.kept().join(LAYER_REFS);
        let stay: Vec<String> = listed.into_iter().filter(|name| has(temporary, name)).collect();
        match stay.is_empty() {
            true => ignore_missing(fs::remove_file(path)),
            false => replace(&path, stay.join("\n").as_bytes()),
        }
    }

    /// Adds or removes libostree's mark for a commit without some of its content.
    fn mark_partial(&self, commit: &ObjectId, partial: bool) -> io::Result<()> {
        let path = partial_mark(&self.repo, commit);
        // The file must be empty: 'f' would mean that fsck found missing objects.
        if partial { fs::write(path, b"") } else { ignore_missing(fs::remove_file(path)) }
    }

    pub(super) fn heads(&self) -> PathBuf {
        self.repo.join("refs/heads")
    }

    fn ref_path(&self) -> PathBuf {
        self.heads().join(NODE_IMAGE_REF)
    }
}

/// Returns the refs of incomplete pulls. A power cut may have damaged the list, so other lines than names are ignored.
fn listed_refs(disk: &Disk) -> io::Result<Vec<String>> {
    let list = if_found(fs::read(disk.kept().join(LAYER_REFS)))?.unwrap_or_default();
    let lines = list.split(|byte| *byte == b'\n').map(String::from_utf8_lossy);
    Ok(lines.filter(|line| is_layer_ref(line)).map(|line| line.into_owned()).collect())
}

/// Returns the path of libostree's mark for a commit without some of its content.
fn partial_mark(repo: &Path, commit: &ObjectId) -> PathBuf {
    repo.join("state").join(format!("{commit}.commitpartial"))
}
