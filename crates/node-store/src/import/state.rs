//! What all layers of one import share: the wanted set, the writer, the counters.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::PullProgress;
use crate::image::{Failure, Kind};
use crate::store::{BootedRepo, NodeStore, ObjectId, ObjectSet, ObjectType, ObjectWriter, StoreLock, WriteError};

use super::budget::Budget;
use super::tree::{Target, TreeError, path_of, walk};
use super::wanted::wanted;

/// The most holes of sparse files that one pull takes. They cost no room but time: zeros are hashed, and
/// this many take some three to ten seconds.
const MOST_HOLES: u64 = if cfg!(fuzzing) { 1 << 20 } else { 4 << 30 };

/// One import. Layers hold it by `Arc` from their threads, and with it the lock: no thread of an
/// import that failed can still write when the next one begins.
pub(super) struct Import {
    /// The commit that the image's label names.
    pub commit: ObjectId,
    pub store: NodeStore,
    pub booted: Option<BootedRepo>,
    pub writer: ObjectWriter,
    pub progress: Arc<PullProgress>,
    /// What plain layers may take of memory, all of them together.
    pub budget: Budget,
    /// Fires when nothing is wanted any more.
    done: Mutex<CancellationToken>,
    /// Whether what only the kernel's modules directory has is wanted too.
    complete: bool,
    booted_content: ObjectSet,
    /// What the store had when this import began.
    stored_before: ObjectSet,
    wants: Mutex<Option<Wants>>,
    objects_written: AtomicU64,
    bytes_fetched: AtomicU64,
    /// Bytes of holes that were agreed to.
    holes: AtomicU64,
    /// Content objects that plain layers brought in this run.
    derived: Mutex<ObjectSet>,
    _lock: StoreLock,
}

struct Wants {
    /// The commit that the label names, and with plain layers on top the merged tree too.
    target: Target,
    base: ObjectSet,
    open: ObjectSet,
    /// Whether the target is the merged tree, so that nothing is wanted but what is open.
    merged: bool,
}

impl Import {
    /// Lists both repos. Blocks.
    pub(super) fn new(
        commit: ObjectId,
        store: &NodeStore,
        booted: Option<&BootedRepo>,
        complete: bool,
        progress: Arc<PullProgress>,
        lock: StoreLock,
    ) -> io::Result<Self> {
        Ok(Self {
            commit,
            store: store.clone(),
            booted: booted.cloned(),
            writer: store.writer()?,
            progress,
            budget: Budget::default(),
            done: Mutex::default(),
            complete,
            booted_content: booted.map(BootedRepo::content_objects).transpose()?.unwrap_or_default(),
            stored_before: store.content_objects()?,
            wants: Mutex::new(None),
            objects_written: AtomicU64::new(0),
            bytes_fetched: AtomicU64::new(0),
            holes: AtomicU64::new(0),
            derived: Mutex::default(),
            _lock: lock,
        })
    }

    /// Lists the target from metadata that is stored by now and fixes the wanted set, once.
    pub(super) fn fix_wanted(&self) -> Result<(), TreeError> {
        if self.wants().is_some() {
            return Ok(());
        }
        let target = walk(&self.commit, &mut |id, kind| self.read_metadata(id, kind))?;
        // The objects that this run stored before the target was known (an old format that mixes
        // metadata and content) are on disk and no longer wanted.
        let mut open = wanted(&target, &self.booted_content, &self.stored_before, self.complete);
        if self.objects_written.load(Ordering::Relaxed) > 0 {
            open.retain(|id| !self.store.has(id, ObjectType::File));
        }
        PullProgress::add(&self.progress.objects_wanted, open.len() as u64);
        if open.is_empty() {
            self.done().cancel();
        }
        let base = target.content.keys().copied().collect();
        *self.wants() = Some(Wants { target, base, open, merged: false });
        Ok(())
    }

    /// Makes the merged tree the target, once layers have been laid over the commit. The answer is
    /// what is wanted now.
    pub(super) fn retarget(&self, target: Target) -> ObjectSet {
        let mut guard = self.wants();
        let base = guard.take().map(|wants| wants.base).unwrap_or_default();
        let mut open = wanted(&target, &self.booted_content, &self.stored_before, self.complete);
        open.retain(|id| !self.store.has(id, ObjectType::File));
        PullProgress::add(&self.progress.objects_wanted, open.len() as u64);
        *guard = Some(Wants { target, base, open: open.clone(), merged: true });
        open
    }

    /// Adds objects of the merged tree to what is wanted. Returns what is wanted now.
    pub(super) fn want(&self, more: &ObjectSet) -> ObjectSet {
        let mut guard = self.wants();
        let Some(wants) = guard.as_mut() else { return ObjectSet::new() };
        let before = wants.open.len();
        wants.open.extend(more.iter().filter(|id| !self.store.has(id, ObjectType::File)));
        PullProgress::add(&self.progress.objects_wanted, (wants.open.len() - before) as u64);
        wants.open.clone()
    }

    /// Fires when nothing is wanted any more.
    pub(super) fn done(&self) -> CancellationToken {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets that nothing was wanted any more.
    pub(super) fn go_on(&self) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = CancellationToken::new();
    }

    /// Whether the commit that the label names has the content object.
    pub(super) fn base_has(&self, id: &ObjectId) -> bool {
        self.wants().as_ref().is_some_and(|wants| wants.base.contains(id))
    }

    /// Whether a content object of a plain layer, at `path` below the root, is to be kept. Before layers
    /// were laid over each other: whatever could be needed. After: what is still wanted.
    pub(super) fn keeps_derived(&self, id: &ObjectId, path: &str) -> bool {
        match self.wants().as_ref() {
            Some(wants) if wants.merged => wants.open.contains(id),
            _ => self.keeps_at(id, path),
        }
    }

    /// Whether a content object that is at `path` belongs into the store.
    pub(super) fn keeps_at(&self, id: &ObjectId, path: &str) -> bool {
        !self.booted_content.contains(id) && (self.complete || !path.starts_with("usr/lib/modules/"))
    }

    /// The content objects of the target; none before it is known.
    pub(super) fn target_content(&self) -> Vec<ObjectId> {
        self.wants().as_ref().map(|wants| wants.target.content.keys().copied().collect()).unwrap_or_default()
    }

    /// Where a content object of the target is, if it is anywhere.
    pub(super) fn content_path(&self, id: &ObjectId) -> Option<PathBuf> {
        match &self.booted {
            // Listed when this import began: no need to look in the store first.
            Some(booted) if self.booted_content.contains(id) => Some(booted.object_path(id, ObjectType::File)),
            _ => self.store.find_object(id, ObjectType::File),
        }
    }

    /// Notes a content object of a plain layer that was written.
    pub(super) fn derived_stored(&self, id: &ObjectId, size: u64) {
        if self.stored_before.contains(id) {
            return;
        }
        if self.wants().as_mut().is_some_and(|wants| wants.open.contains(id)) {
            return self.content_stored(id, size);
        }
        if self.derived.lock().unwrap_or_else(PoisonError::into_inner).insert(*id) {
            PullProgress::add(&self.progress.objects_wanted, 1);
            self.objects_written.fetch_add(1, Ordering::Relaxed);
            PullProgress::add(&self.progress.objects_done, 1);
            PullProgress::add(&self.progress.bytes_written, size);
        }
    }

    /// Removes what plain layers brought in this run and a later layer replaced or hid. `keep` says
    /// what is needed for other reasons.
    pub(super) fn prune_derived(&self, keep: impl Fn(&ObjectId) -> bool) -> io::Result<()> {
        let wants = self.wants();
        let Some(wants) = wants.as_ref() else { return Ok(()) };
        for id in self.derived.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if !wants.target.content.contains_key(id) && !wants.base.contains(id) && !keep(id) {
                self.store.remove_content(id)?;
            }
        }
        Ok(())
    }

    pub(super) fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        if let Some(found) = self.store.read_metadata(id, kind)? {
            return Ok(Some(found));
        }
        match &self.booted {
            Some(booted) => booted.read_metadata(id, kind),
            None => Ok(None),
        }
    }

    /// Whether a content object is to be written. While the target is not known yet: whatever
    /// neither repo has.
    pub(super) fn wants_content(&self, id: &ObjectId) -> bool {
        match self.wants().as_ref() {
            Some(wants) => wants.open.contains(id),
            None => !self.booted_content.contains(id) && !self.store.has(id, ObjectType::File),
        }
    }

    /// Returns true if a metadata object must be written: it is missing, damaged or cannot be read.
    pub(super) fn wants_metadata(&self, id: &ObjectId, kind: ObjectType) -> bool {
        !matches!(self.read_metadata(id, kind), Ok(Some(_)))
    }

    /// Notes a content object that was written.
    pub(super) fn content_stored(&self, id: &ObjectId, size: u64) {
        let mut wants = self.wants();
        let news = match wants.as_mut() {
            Some(wants) => {
                let news = wants.open.remove(id);
                if wants.open.is_empty() {
                    self.done().cancel();
                }
                news
            }
            None => true,
        };
        drop(wants);
        if news {
            self.objects_written.fetch_add(1, Ordering::Relaxed);
            PullProgress::add(&self.progress.objects_done, 1);
            PullProgress::add(&self.progress.bytes_written, size);
        }
    }

    /// Agrees to hash the holes of a sparse file of `size` bytes, or refuses: a few bytes of an archive can
    /// declare any number of them. What does not fit the store as a whole is refused too, though its holes
    /// take no room there, because whoever copies it may write them out.
    pub(super) fn agree_to_holes(&self, entry: &str, size: u64, holes: u64) -> Result<(), Failure> {
        if holes == 0 {
            return Ok(());
        }
        let before =
            self.holes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| Some(sum.saturating_add(holes)));
        let sum = before.unwrap_or_else(|sum| sum).saturating_add(holes);
        let what = format!("{entry} is a sparse file of {size} bytes");
        if sum > MOST_HOLES {
            let message = format!("{what}: that makes holes of {sum} bytes, and an image may have {MOST_HOLES}");
            return Err(Failure::new(Kind::BadFormat, message));
        }
        match self.store.space() {
            Ok((free, _)) if size > free => Err(self.no_space(&what)),
            _ => Ok(()),
        }
    }

    /// Notes compressed bytes that arrived.
    pub(super) fn fetched(&self, bytes: u64) {
        self.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
        PullProgress::add(&self.progress.bytes_fetched, bytes);
    }

    /// Objects written and bytes fetched by this run.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.objects_written.load(Ordering::Relaxed), self.bytes_fetched.load(Ordering::Relaxed))
    }

    /// How many objects are still wanted, and one of them; `None` while that is not known.
    pub(super) fn still_wanted(&self) -> Option<(usize, Option<ObjectId>)> {
        self.wants().as_ref().map(|wants| (wants.open.len(), wants.open.iter().min().copied()))
    }

    /// Whether every content object of the target is in one of the two repos by now.
    pub(super) fn is_complete(&self) -> bool {
        let wants = self.wants();
        let Some(wants) = wants.as_ref() else { return false };
        let unstored: HashSet<&ObjectId> =
            wants.target.content.keys().filter(|id| !self.stored_before.contains(*id)).collect();
        super::wanted::is_complete(&wants.target, &self.booted_content, |id| {
            !unstored.contains(id) || self.store.has(id, ObjectType::File)
        })
    }

    /// Whether all content of the commit that the label names is here, whatever became of it on top.
    pub(super) fn base_is_complete(&self) -> bool {
        let wants = self.wants();
        let here = |id: &ObjectId| {
            self.booted_content.contains(id) || self.stored_before.contains(id) || self.store.has(id, ObjectType::File)
        };
        wants.as_ref().is_some_and(|wants| wants.base.iter().all(here))
    }

    /// A failure to store, in the terms of the field.
    pub(super) fn write_failure(&self, layer: &str, error: &WriteError) -> Failure {
        match error {
            WriteError::Mismatch { id, .. } => {
                let path = path_of(&self.commit, id, &mut |id, kind| self.read_metadata(id, kind));
                let place = path.map(|path| format!(" ({path})")).unwrap_or_default();
                Failure::new(Kind::BadDigest, format!("{layer}: {error}{place}"))
            }
            WriteError::Io { source, .. } if is_no_space(source) => self.no_space(&format!("{layer}: {error}")),
            WriteError::Io { source, .. } => Failure::new(Kind::Local, format!("{layer}: {error}: {source}")),
        }
    }

    /// A failure to write one of the store's own files.
    pub(super) fn store_failure(&self, layer: &str, error: &io::Error) -> Failure {
        match is_no_space(error) {
            true => self.no_space(&format!("{layer}: {error}")),
            false => Failure::new(Kind::Local, format!("{layer}: {error}")),
        }
    }

    /// What is wrong with the commit or with the tree made of it.
    pub(super) fn tree_failure(&self, error: &TreeError) -> Failure {
        let kind = if matches!(error, TreeError::Malformed(..)) { Kind::BadFormat } else { Kind::Local };
        Failure::new(kind, format!("commit {}: {error}", self.commit))
    }

    /// A failure of this machine's own.
    pub(super) fn local(&self, error: impl std::fmt::Display) -> Failure {
        Failure::new(Kind::Local, format!("commit {}: {error}", self.commit))
    }

    /// Whether the content object is wanted and has not come.
    pub(super) fn is_open(&self, id: &ObjectId) -> bool {
        self.wants().as_ref().is_some_and(|wants| wants.open.contains(id))
    }

    /// How many content objects are wanted and have not come, and how many the target has.
    pub(super) fn shares(&self) -> (usize, usize) {
        self.wants().as_ref().map_or((0, 0), |wants| (wants.open.len(), wants.target.content.len()))
    }

    fn wants(&self) -> MutexGuard<'_, Option<Wants>> {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
