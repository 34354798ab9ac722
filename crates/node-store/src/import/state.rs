//! State shared by all layers of one import: the wanted set, the writer and the counters.

use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use crate::PullProgress;
use crate::image::decompress::Decoders;
use crate::image::{Failure, Kind, Layer};
use crate::store::{
    BootedRepo, HeldLayers, NodeStore, ObjectId, ObjectSet, ObjectType, ObjectWriter, StoreLock, WriteError,
};

use super::base::Base;
use super::budget::Budget;
use super::replaced::{Replaced, Replacement};
use super::tree::{Target, TreeError};
use super::wanted::wanted;
use support::lock;

/// Limit in bytes for the holes of sparse files in one pull. Holes need no space, but their zeros are hashed: this many
/// take three to ten seconds.
const MAX_HOLES: u64 = if cfg!(fuzzing) { 1 << 20 } else { 4 << 30 };

thread_local! {
    static STORED: Cell<u64> = const { Cell::new(0) };
}

/// Returns the bytes of content objects that this thread has stored. One thread writes all objects of a layer.
pub(super) fn stored_by_this_thread() -> u64 {
    STORED.get()
}

/// One import, with its lock. The threads of all layers share it by `Arc`, so that the lock is held until the last
/// thread of a failed import has ended.
pub(super) struct Import {
    pub base: Base,
    pub store: NodeStore,
    pub booted: Option<BootedRepo>,
    pub writer: ObjectWriter,
    pub progress: Arc<PullProgress>,
    /// Layers of images in the booted repo.
    pub held: HeldLayers,
    /// Memory that all plain layers together may use.
    pub budget: Budget,
    /// Decoders of the layers.
    pub decoders: Decoders,
    /// Cancelled when no object is wanted any more.
    done: Mutex<CancellationToken>,
    /// True if objects that occur only in `/usr/lib/modules` are wanted too.
    pub complete: bool,
    booted_content: ObjectSet,
    /// Content objects that the store had when this import started.
    stored_before: ObjectSet,
    wants: Mutex<Option<Wants>>,
    objects_written: AtomicU64,
    bytes_fetched: AtomicU64,
    /// Bytes of holes accepted so far.
    holes: AtomicU64,
    /// Content objects of plain layers that this run stored.
    derived: Mutex<ObjectSet>,
    replaced: Replaced,
    _lock: StoreLock,
}

struct Wants {
    /// The base, or the merged tree.
    target: Target,
    /// All content objects of the base.
    base: ObjectSet,
    /// Wanted objects that are not stored yet.
    open: ObjectSet,
    /// True if the target is the merged tree. Only `open` objects are wanted then.
    merged: bool,
}

impl Wants {
    /// Returns true if neither the merged tree nor the base has the object.
    fn is_unused(&self, id: &ObjectId) -> bool {
        !self.target.content.contains_key(id) && !self.base.contains(id)
    }
}

impl Import {
    /// Lists the content objects of both repos. Blocks.
    pub(super) fn new(
        base: Base,
        store: &NodeStore,
        booted: Option<&BootedRepo>,
        complete: bool,
        budget: Budget,
        progress: Arc<PullProgress>,
        lock: StoreLock,
    ) -> io::Result<Self> {
        Ok(Self {
            base,
            store: store.clone(),
            booted: booted.cloned(),
            held: booted.map(BootedRepo::held_layers).unwrap_or_default(),
            writer: store.writer()?,
            progress,
            budget,
            decoders: Decoders::default(),
            done: Mutex::default(),
            complete,
            booted_content: booted.map(BootedRepo::content_objects).transpose()?.unwrap_or_default(),
            stored_before: store.content_objects()?,
            wants: Mutex::new(None),
            objects_written: AtomicU64::new(0),
            bytes_fetched: AtomicU64::new(0),
            holes: AtomicU64::new(0),
            derived: Mutex::default(),
            replaced: Replaced::open(store.replaced_list())?,
            _lock: lock,
        })
    }

    /// Lists the target from the stored metadata and computes the wanted set. Does nothing if that has been done.
    pub(super) fn fix_wanted(&self) -> Result<(), TreeError> {
        if lock(&self.wants).is_some() {
            return Ok(());
        }
        let target = self.base.target(&mut |id, kind| self.read_metadata(id, kind))?;
        // Old formats mix metadata and content, so this run may have stored objects before the target was known.
        let mut open = wanted(&target, &self.booted_content, &self.stored_before, self.complete);
        if self.objects_written.load(Ordering::Relaxed) > 0 {
            open.retain(|id| !self.store.has(id, ObjectType::File));
        }
        self.progress.update(|now| now.objects_wanted += open.len() as u64);
        if open.is_empty() {
            self.done().cancel();
        }
        let base = target.content.keys().copied().collect();
        *lock(&self.wants) = Some(Wants { target, base, open, merged: false });
        Ok(())
    }

    /// Makes the merged tree the target. Returns the objects that are wanted now.
    pub(super) fn retarget(&self, target: Target) -> ObjectSet {
        let mut guard = lock(&self.wants);
        let base = guard.take().map(|wants| wants.base).unwrap_or_default();
        let mut open = wanted(&target, &self.booted_content, &self.stored_before, self.complete);
        open.retain(|id| !self.store.has(id, ObjectType::File) && self.replacement(id).is_none());
        self.progress.update(|now| now.objects_wanted += open.len() as u64);
        *guard = Some(Wants { target, base, open: open.clone(), merged: true });
        open
    }

    /// Adds objects of the merged tree to the wanted set. Returns the objects that are wanted now.
    pub(super) fn want(&self, more: &ObjectSet) -> ObjectSet {
        let mut guard = lock(&self.wants);
        let Some(wants) = guard.as_mut() else { return ObjectSet::new() };
        let before = wants.open.len();
        wants.open.extend(more.iter().filter(|id| !self.store.has(id, ObjectType::File)));
        self.progress.update(|now| now.objects_wanted += (wants.open.len() - before) as u64);
        wants.open.clone()
    }

    /// Returns a token that is cancelled when no object is wanted any more.
    pub(super) fn done(&self) -> CancellationToken {
        lock(&self.done).clone()
    }

    /// Replaces the token of [`Import::done`] by one that is not cancelled, after objects were added to the wanted set.
    pub(super) fn reset_done(&self) {
        *lock(&self.done) = CancellationToken::new();
    }

    /// Returns true if the base commit has the content object.
    pub(super) fn base_has(&self, id: &ObjectId) -> bool {
        lock(&self.wants).as_ref().is_some_and(|wants| wants.base.contains(id))
    }

    /// Returns true if a content object of a plain layer must be stored. `path` is relative to the root. Before the
    /// merge, every object that could be needed is; after it, every object that is still wanted.
    pub(super) fn keeps_derived(&self, id: &ObjectId, path: &str) -> bool {
        match lock(&self.wants).as_ref() {
            Some(wants) if wants.merged => wants.open.contains(id),
            _ => self.keeps_at(id, path),
        }
    }

    /// Returns true if the store should have a content object that is at `path`, relative to the root.
    pub(super) fn keeps_at(&self, id: &ObjectId, path: &str) -> bool {
        !self.booted_content.contains(id) && (self.complete || !path.starts_with("usr/lib/modules/"))
    }

    /// Returns the content objects of the target, or none while the target is unknown.
    pub(super) fn target_content(&self) -> Vec<ObjectId> {
        lock(&self.wants).as_ref().map(|wants| wants.target.content.keys().copied().collect()).unwrap_or_default()
    }

    /// Returns true if the booted repo holds the layer, or the same layer in another compression.
    pub(super) fn booted_has_layer(&self, layer: &Layer) -> bool {
        let has_ref = |booted: &BootedRepo| booted.has_layer(&layer.digest());
        self.held.find(&layer.digest(), &layer.diff_id).is_some() || self.booted.as_ref().is_some_and(has_ref)
    }

    /// Returns the file of a content object in the booted repo.
    pub(super) fn booted_file(&self, id: &ObjectId) -> Option<PathBuf> {
        let booted = self.booted.as_ref().filter(|_| self.booted_content.contains(id))?;
        Some(booted.object_path(id, ObjectType::File))
    }

    /// Returns the file of a content object of the target, or of the copy that replaces it. Returns `None` if neither repo
    /// has one.
    pub(super) fn content_path(&self, id: &ObjectId) -> Option<PathBuf> {
        // The booted repo was listed when the import started, so that the store need not be searched.
        let own = |id: &ObjectId| self.booted_file(id).or_else(|| self.store.find_object(id, ObjectType::File));
        own(id).or_else(|| own(&self.replacement(id)?.copy))
    }

    /// Returns the copy that replaces a removed object, if neither repo has the object and one of them has the copy.
    pub(super) fn replacement(&self, id: &ObjectId) -> Option<Replacement> {
        let found = self.replaced.find(id)?;
        (!self.has_content(id) && self.has_content(&found.copy)).then_some(found)
    }

    /// Returns true if one of the two repos has the content object itself, not only a copy that replaces it.
    pub(super) fn has_content(&self, id: &ObjectId) -> bool {
        self.booted_content.contains(id) || self.store.has(id, ObjectType::File)
    }

    /// Returns true if no commit of an earlier pull can have a content object of the store.
    pub(super) fn is_unpublished(&self, id: &ObjectId) -> bool {
        !self.stored_before.contains(id) || self.store.is_pending(id)
    }

    /// Removes an object of a plain layer after a relabelled copy of it was stored, so that the store has its content once.
    pub(super) fn replace(&self, id: &ObjectId, replacement: Replacement) -> io::Result<()> {
        self.replaced.add(*id, replacement)?;
        lock(&self.derived).remove(id);
        self.store.remove_content(id, &self.writer)
    }

    /// Records that a content object of a plain layer was written.
    pub(super) fn derived_stored(&self, id: &ObjectId, size: u64) {
        if self.stored_before.contains(id) {
            return;
        }
        if lock(&self.wants).as_mut().is_some_and(|wants| wants.open.contains(id)) {
            return self.content_stored(id, size);
        }
        if lock(&self.derived).insert(*id) {
            self.progress.update(|now| now.objects_wanted += 1);
            self.written(size);
        }
    }

    /// Removes objects of plain layers that this run stored and that the merged tree does not have, because a later
    /// layer replaced or hid them. Objects for which `keep` returns true stay.
    pub(super) fn prune_derived(&self, keep: impl Fn(&ObjectId) -> bool) -> io::Result<()> {
        let wants = lock(&self.wants);
        let Some(wants) = wants.as_ref() else { return Ok(()) };
        let derived = lock(&self.derived);
        let mut hidden = derived.iter().filter(|id| wants.is_unused(id) && !keep(id));
        hidden.try_for_each(|id| self.store.remove_content(id, &self.writer))
    }

    /// Returns true if a content object was stored for a plain layer, and neither the merged tree nor the base has it.
    pub(super) fn is_hidden(&self, id: &ObjectId) -> bool {
        lock(&self.wants).as_ref().is_some_and(|wants| wants.is_unused(id)) && lock(&self.derived).contains(id)
    }

    /// Reads a metadata object from the node store or the booted repo. Returns `None` if neither has it.
    pub(super) fn read_metadata(&self, id: &ObjectId, kind: ObjectType) -> io::Result<Option<Vec<u8>>> {
        if let Some(found) = self.store.read_metadata(id, kind)? {
            return Ok(Some(found));
        }
        match &self.booted {
            Some(booted) => booted.read_metadata(id, kind),
            None => Ok(None),
        }
    }

    /// Returns true if a content object must be written. While the target is unknown, that is every object that neither
    /// repo has.
    pub(super) fn wants_content(&self, id: &ObjectId) -> bool {
        match lock(&self.wants).as_ref() {
            Some(wants) => wants.open.contains(id),
            None => !self.booted_content.contains(id) && !self.store.has(id, ObjectType::File),
        }
    }

    /// Returns true if a metadata object must be written: it is missing, damaged or cannot be read.
    pub(super) fn wants_metadata(&self, id: &ObjectId, kind: ObjectType) -> bool {
        !matches!(self.read_metadata(id, kind), Ok(Some(_)))
    }

    /// Records that a content object was written.
    pub(super) fn content_stored(&self, id: &ObjectId, size: u64) {
        let mut wants = lock(&self.wants);
        let is_new = match wants.as_mut() {
            Some(wants) => {
                let was_open = wants.open.remove(id);
                if wants.open.is_empty() {
                    self.done().cancel();
                }
                was_open
            }
            None => true,
        };
        drop(wants);
        if is_new {
            self.written(size);
        }
    }

    fn written(&self, size: u64) {
        STORED.set(STORED.get() + size);
        self.objects_written.fetch_add(1, Ordering::Relaxed);
        self.progress.update(|now| {
            now.objects_done += 1;
            now.bytes_written += size;
        });
    }

    /// Checks a sparse file of `size` bytes, of which `holes` are in holes, before its holes are hashed.
    ///
    /// # Errors
    /// If all holes of the pull together exceed the limit, because a few bytes of an archive can declare any number of
    /// them; or if `size` exceeds the free space of the store, because a copy of the file may need all of it.
    pub(super) fn check_holes(&self, entry: &str, size: u64, holes: u64) -> Result<(), Failure> {
        if holes == 0 {
            return Ok(());
        }
        let before =
            self.holes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| Some(sum.saturating_add(holes)));
        let sum = before.unwrap_or_else(|sum| sum).saturating_add(holes);
        let what = format!("{entry} is a sparse file of {size} bytes");
        if sum > MAX_HOLES {
            let message =
                format!("{what}: sparse holes of {sum} bytes exceed the limit of {MAX_HOLES} bytes per image");
            return Err(Failure::new(Kind::BadFormat, message));
        }
        match self.store.space() {
            Ok((free, _)) if size > free => Err(self.no_space(&what)),
            _ => Ok(()),
        }
    }

    /// Adds compressed bytes to the number of fetched bytes.
    pub(super) fn fetched(&self, bytes: u64) {
        self.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
        self.progress.update(|now| now.bytes_fetched += bytes);
    }

    /// Returns the number of objects written and of bytes fetched by this run.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.objects_written.load(Ordering::Relaxed), self.bytes_fetched.load(Ordering::Relaxed))
    }

    /// Returns the number of objects that are still wanted and one of them, or `None` while the target is unknown.
    pub(super) fn still_wanted(&self) -> Option<(usize, Option<ObjectId>)> {
        lock(&self.wants).as_ref().map(|wants| (wants.open.len(), wants.open.iter().min().copied()))
    }

    /// Returns true if every content object of the target is in one of the two repos.
    pub(super) fn is_complete(&self) -> bool {
        let wants = lock(&self.wants);
        let Some(wants) = wants.as_ref() else { return false };
        let unstored: HashSet<&ObjectId> =
            wants.target.content.keys().filter(|id| !self.stored_before.contains(*id)).collect();
        super::wanted::is_complete(&wants.target, &self.booted_content, |id| {
            !unstored.contains(id) || self.store.has(id, ObjectType::File)
        })
    }

    /// Returns true if all content objects of the base commit are in one of the two repos, even those that a plain layer
    /// replaces.
    pub(super) fn base_is_complete(&self) -> bool {
        let wants = lock(&self.wants);
        let is_present = |id: &ObjectId| {
            self.booted_content.contains(id) || self.stored_before.contains(id) || self.store.has(id, ObjectType::File)
        };
        wants.as_ref().is_some_and(|wants| wants.base.iter().all(is_present))
    }

    /// Converts an error of the writer into a failure that names the layer and, for a wrong object, its path.
    pub(super) fn write_failure(&self, layer: &str, error: &WriteError) -> Failure {
        match error {
            WriteError::Mismatch { id, .. } => {
                let path = self.base.path_of(id, &mut |id, kind| self.read_metadata(id, kind));
                let place = path.map(|path| format!(" ({path})")).unwrap_or_default();
                Failure::new(Kind::BadDigest, format!("{layer}: {error}{place}"))
            }
            WriteError::Io { source, .. } if is_no_space(source) => self.no_space(&format!("{layer}: {error}")),
            WriteError::Io { source, .. } => Failure::new(Kind::Local, format!("{layer}: {error}: {source}")),
        }
    }

    /// Converts an error of writing one of the store's own files into a failure.
    pub(super) fn store_failure(&self, layer: &str, error: &io::Error) -> Failure {
        match is_no_space(error) {
            true => self.no_space(&format!("{layer}: {error}")),
            false => Failure::new(Kind::Local, format!("{layer}: {error}")),
        }
    }

    /// Converts an error of reading the tree into a failure that names the base.
    pub(super) fn tree_failure(&self, error: &TreeError) -> Failure {
        let kind = if matches!(error, TreeError::Malformed(..)) { Kind::BadFormat } else { Kind::Local };
        Failure::new(kind, format!("{}: {error}", self.base))
    }

    /// Returns a failure of this machine that names the base.
    pub(super) fn local(&self, error: impl std::fmt::Display) -> Failure {
        Failure::new(Kind::Local, format!("{}: {error}", self.base))
    }

    /// Returns true if the content object is wanted and not stored yet.
    pub(super) fn is_open(&self, id: &ObjectId) -> bool {
        lock(&self.wants).as_ref().is_some_and(|wants| wants.open.contains(id))
    }

    /// Returns the number of content objects that are still wanted, and that of the target.
    pub(super) fn open_and_total(&self) -> (usize, usize) {
        lock(&self.wants).as_ref().map_or((0, 0), |wants| (wants.open.len(), wants.target.content.len()))
    }
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
