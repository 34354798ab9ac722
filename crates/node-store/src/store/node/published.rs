//! The refs of the node store's repo, the marks of partial commits, and the end of a pull, which sets both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::NODE_IMAGE_REF;
use super::super::disk::Disk;
use super::super::object::{ObjectId, ObjectType};
use super::{NodeStore, existing};
use support::{if_found, ignore_missing};

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
    /// refs to complete commits, in the order in which they are set.
    ///
    /// In a disk store, each step is on the disk before the next one begins. After an error the repo is consistent, and
    /// the caller may call this again. After a reboot, the pull must be repeated.
    pub fn publish(&self, commits: &[(ObjectId, bool)], refs: &[(String, ObjectId)]) -> io::Result<()> {
        if let Some(disk) = &self.disk {
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
        for (name, commit) in refs {
            self.write_ref(name, commit)?;
        }
        if let Some((commit, _)) = commits.last() {
            self.set_ref(commit)?;
        }
        self.disk.as_ref().map_or(Ok(()), Disk::sync)
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

    /// Removes the ref `coreos/node-image`, if it exists.
    pub fn remove_ref(&self) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.ref_path()))?;
        self.sync_refs()
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

/// Returns the path of libostree's mark for a commit without some of its content.
fn partial_mark(repo: &Path, commit: &ObjectId) -> PathBuf {
    repo.join("state").join(format!("{commit}.commitpartial"))
}
