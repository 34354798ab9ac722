//! Runs an import in order: metadata, the layers that may hold wanted objects, plain layers, the ref.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::PullProgress;
use crate::image::{Failure, ImageDescription, Kind, Layer, Layout, ResolvedImage, Source};
use crate::store::{BootedRepo, LockError, NodeStore, ObjectId, ObjectType, Scope, StoreLock};

use super::base::Base;
use super::budget::Budget;
use super::encapsulated::Purpose;
use super::fetch::{cancelled, fetch_encapsulated};
use super::image_refs::{ImageRefs, has_image, has_nothing_wanted, image_refs, layer_refs, restore_image_refs};
use super::plain::{Derived, remove_left_policies};
use super::plain_layers::PlainLayers;
use super::run::{Read, Run, all_of, blocking, local};
use super::state::Import;
use super::tree::TreeError;
use super::wanted::{Earlier, Round, rounds};

/// Options of a pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Also fetch the objects that occur only in `/usr/lib/modules`, so that the commit can be deployed elsewhere.
    pub complete: bool,
    /// The commit that the import must result in. If it results in another one, the pull fails before the ref moves.
    pub expected: Option<ObjectId>,
    /// Number of layers to read at once. Default: one for each CPU, at least two and at most four.
    pub parallel: Option<usize>,
    /// Limit in bytes for the lists of all plain layers. Default: a sixteenth of the machine's memory, at least 80 MiB and at
    /// most 640 MiB.
    pub list_memory: Option<usize>,
}

/// A pulled image: its commit, and statistics of the run that finished the pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledImage {
    /// The image that was pulled.
    pub image: ResolvedImage,
    /// The ostree commit. All of its metadata objects are in the node store or the booted repo.
    pub commit: ObjectId,
    /// The booted commit whose objects were not fetched.
    pub booted_commit: Option<ObjectId>,
    /// True if all content objects, kernel modules included, are in the node store or the booted repo.
    pub complete: bool,
    /// Layers read from the registry by the run that finished the pull.
    pub layers_fetched: u64,
    /// Layers that were not needed or that an earlier run had read.
    pub layers_skipped: u64,
    /// Compressed bytes read from the registry by that run.
    pub bytes_fetched: u64,
    /// Content objects written by that run.
    pub objects_written: u64,
    /// Warnings for the operator, one line each.
    pub warnings: Vec<String>,
}

/// Imports the objects of `image` that `booted` lacks into `store`, then points `coreos/node-image` at the commit.
///
/// Returns at once, without asking the registry, if an earlier call pulled the same image. After a failed or killed
/// pull, layers that were read to their end are not fetched again. Each object is checked against its name before it
/// becomes visible. The ref is set last. One import runs at a time: a second caller waits until the first ends or until
/// `cancel`.
///
/// # Errors
/// The message names the image and the layer. A failed pull changes only the node store, and the objects in it stay
/// valid.
pub async fn pull(
    source: &Source,
    image: &ResolvedImage,
    store: &NodeStore,
    booted: Option<&BootedRepo>,
    options: &PullOptions,
    progress: Arc<PullProgress>,
    cancel: &CancellationToken,
) -> Result<PulledImage, Failure> {
    let lock = lock(store, image, &progress, cancel).await?;
    if let Some(before) = pulled_before(image, store, booted, options)? {
        return Ok(before);
    }
    let description = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled(&image.pinned)),
        description = source.manifest(image) => description?,
    };
    let base = Base::of(&description.layout);
    let booted_commit = booted.and_then(|booted| booted.commit);
    let scope = Scope::new(options.complete, booted_commit);
    let journal = store.journal().map_err(|error| local(image, error))?;
    let import = {
        let (store, booted, complete) = (store.clone(), booted.cloned(), options.complete);
        let budget = options.list_memory.map_or_else(|| Budget::on_machine(memory()), Budget::new);
        let progress = progress.clone();
        let list = move || {
            remove_left_policies(&store)?;
            Import::new(base, &store, booted.as_ref(), complete, budget, progress, lock)
        };
        blocking(image, list).await?.map(Arc::new).map_err(|error| local(image, error))?
    };
    let layers: Vec<&Layer> = description.layout.layers().collect();
    progress.update(|now| now.layers_total += layers.len() as u64);
    let run = Run { source, image, import: &import, journal: &journal, scope: &scope, cancel };
    let (fetched, derived) = run.all(&description, options).await?;
    let (commit, sources, layer_commits, mut warnings) = match (derived, base) {
        (Some(derived), _) => (derived.commit, derived.sources, derived.layers, derived.warnings),
        (None, Base::Commit(commit)) => (commit, HashSet::new(), HashMap::new(), Vec::new()),
        (None, Base::Empty) => return Err(local(image, "internal error: a plain image without layers")),
    };

    if let Some(expected) = options.expected.filter(|expected| *expected != commit) {
        let message = format!(
            "cannot complete {}: the import resulted in commit {commit} instead of {expected}, which the ref still names",
            image.pinned
        );
        return Err(Failure { advice: "reboot, then pull with --complete", ..Failure::new(Kind::Local, message) });
    }
    let (finished, described, name) = (import.clone(), description.clone(), image.clone());
    let again = options.expected.is_some();
    let complete = blocking(image, move || -> Result<bool, Failure> {
        let fail = |error: std::io::Error| finished.store_failure(&name.pinned.to_string(), &error);
        let (complete, base_complete) = (finished.is_complete(), finished.base_is_complete());
        // The commits of the layers have objects that later layers hide.
        finished.prune_derived(|id| complete || sources.contains(id)).map_err(fail)?;
        let made = match complete && base_complete {
            true => image_refs(&finished, &name, &described, commit, &layer_commits, again)?,
            false if finished.store.is_on_disk() => layer_refs(&finished, &described.layout, None, &layer_commits)?,
            // No other program reads a RAM store while it is incomplete, and the commits would use RAM.
            false => ImageRefs::default(),
        };
        let base = base.commit().map(|base| (base, base_complete));
        let stored = made.commits.iter().map(|commit| (*commit, true));
        let commits: Vec<_> = stored.chain(base).chain([(commit, complete)]).collect();
        finished.store.publish(&commits, &made.refs).map_err(fail)?;
        Ok(complete)
    })
    .await??;
    warnings.extend(import.writer.warnings());
    let (objects_written, bytes_fetched) = import.totals();
    let pulled = PulledImage {
        image: image.clone(),
        commit,
        booted_commit,
        complete,
        layers_fetched: fetched.len() as u64,
        layers_skipped: (layers.len() - fetched.len()) as u64,
        bytes_fetched,
        objects_written,
        warnings,
    };
    let record = serde_json::to_vec_pretty(&pulled).map_err(|error| local(image, error))?;
    store.write_record(&record).map_err(|error| local(image, error))?;
    Ok(pulled)
}

impl Run<'_> {
    /// Reads all layers that are needed. Returns the positions of the layers that were read, and the derived commit if
    /// the image has plain layers.
    async fn all(
        &self,
        description: &ImageDescription,
        options: &PullOptions,
    ) -> Result<(HashSet<usize>, Option<Derived>), Failure> {
        let layout = &description.layout;
        let progress = &self.import.progress;
        let mut fetched = HashSet::new();
        // The same commit may be booted, or an earlier run may have stored the metadata.
        let known = self.missing_metadata().await?.is_none();
        // A journal or a ref may claim layers whose objects are missing. Such layers are read last, if objects are
        // still wanted then.
        let earlier = |layer: &Layer| {
            let digest = layer.digest();
            let has_all = self.journal.has(&digest, self.scope) || self.import.booted_has_layer(layer);
            match self.journal.has_most(&digest, self.scope) {
                _ if has_all => Earlier::Read,
                true if has_nothing_wanted(self.import, layer) => Earlier::Read,
                true => Earlier::WithoutModules,
                false => Earlier::Unread,
            }
        };
        let first = layout.encapsulated.as_ref().map(|base| &base.commit_layer).filter(|_| !known);
        let rest = layout.encapsulated().filter(|layer| first.is_none_or(|first| layer.index != first.index));
        let rounds = rounds(rest, earlier, options.complete);
        let expected = rounds.iter().filter(|round| round.expected).flat_map(|round| round.layers.iter().copied());
        let due = expected.chain(&layout.plain).chain(first);
        progress.update(|now| now.bytes_total += due.map(Layer::size).sum::<u64>());
        let unneeded: u64 = rounds.iter().filter(|round| !round.expected).map(|round| round.layers.len() as u64).sum();
        progress.update(|now| now.layers_done += unneeded);
        if let Some(layer) = first {
            self.one(layer, Purpose::Commit).await?;
            fetched.insert(layer.index);
            if let Some(missing) = self.missing_metadata().await? {
                let message = format!("{}: the first layer is incomplete: {missing}", self.image.pinned);
                return Err(Failure::new(Kind::BadFormat, message));
            }
        }
        let parallel = options
            .parallel
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(2, 4));
        let mut plain = PlainLayers::new(self, layout, parallel);
        // Plain layers are read as soon as the objects of the base that they need are stored.
        let mut early = plain.when_ready(&mut fetched).await?;
        let (import, pinned) = (self.import.clone(), self.image.pinned.clone());
        blocking(self.image, move || import.check_space(&pinned)).await??;
        for Round { layers, expected } in rounds {
            let bytes = layers.iter().map(|layer| layer.size()).sum();
            if self.import.done().is_cancelled() {
                progress.reduce_total(if expected { bytes } else { 0 });
                continue;
            }
            if !expected {
                progress.update(|now| {
                    now.bytes_total += bytes;
                    now.layers_done = now.layers_done.saturating_sub(layers.len() as u64);
                });
            }
            let mut due = std::mem::take(&mut early);
            for layer in layers {
                due.push(self.if_needed(layer).boxed());
            }
            all_of(due, parallel, &self.import.decoders, |read| fetched.extend(plain.note(read))).await?;
        }
        all_of(early, parallel, &self.import.decoders, |read| fetched.extend(plain.note(read))).await?;
        self.nothing_is_missing()?;
        let derived = match layout.plain.is_empty() {
            true => None,
            false => Some(plain.commit(description, &mut fetched).await?),
        };
        progress.update(|now| now.layers_done = layout.layers().count() as u64);
        Ok((fetched, derived))
    }

    /// Reads layers of the base commit until no object is wanted. The merged tree can need objects of the base that
    /// were not wanted before. Kernel layers come first, because a delta pull skips them.
    pub(super) async fn rest_of_base(
        &self,
        layout: &Layout,
        parallel: usize,
        fetched: &mut HashSet<usize>,
    ) -> Result<(), Failure> {
        if matches!(self.import.still_wanted(), Some((0, _))) {
            return Ok(());
        }
        self.import.reset_done();
        for Round { layers, .. } in rounds(layout.encapsulated(), |_| Earlier::WithoutModules, false) {
            if self.import.done().is_cancelled() {
                return Ok(());
            }
            let progress = &self.import.progress;
            progress.update(|now| now.bytes_total += layers.iter().map(|layer| layer.size()).sum::<u64>());
            let due = layers.into_iter().map(|layer| self.if_needed(layer).boxed());
            let note = |read| {
                // Most of these layers were counted already, as read or as unneeded.
                if let Read::Encapsulated(index) = read {
                    fetched.insert(index);
                    progress.update(|now| now.layers_done = now.layers_done.saturating_sub(1));
                }
            };
            all_of(due.collect(), parallel, &self.import.decoders, note).await?;
        }
        Ok(())
    }

    /// Reads a layer of the encapsulated commit, unless no object is wanted any more.
    async fn if_needed(&self, layer: &Layer) -> Result<Read, Failure> {
        if self.import.done().is_cancelled() {
            self.import.progress.reduce_total(layer.size());
            return Ok(Read::NotNeeded);
        }
        let purpose = if layer.index == 0 { Purpose::Commit } else { Purpose::Chunk };
        Ok(if self.one(layer, purpose).await? { Read::Encapsulated(layer.index) } else { Read::NotNeeded })
    }

    async fn one(&self, layer: &Layer, purpose: Purpose) -> Result<bool, Failure> {
        let started = std::time::Instant::now();
        let whole = fetch_encapsulated(self, layer, purpose).await?;
        if whole {
            self.journal.add(&layer.digest(), self.scope).map_err(|error| local(self.image, error))?;
            self.import.progress.update(|now| now.layers_done += 1);
        }
        let (digest, seconds) = (layer.digest(), started.elapsed().as_secs_f64());
        tracing::debug!(layer = layer.index, digest, size = layer.size(), seconds, whole, "layer read");
        Ok(whole)
    }

    /// Computes the wanted set from the stored metadata. Returns the first missing metadata object, if any.
    async fn missing_metadata(&self) -> Result<Option<TreeError>, Failure> {
        let import = self.import.clone();
        match blocking(self.image, move || import.fix_wanted()).await? {
            Ok(()) => Ok(None),
            Err(error @ TreeError::Missing(..)) => Ok(Some(error)),
            Err(error @ TreeError::Malformed(..)) => {
                Err(Failure::new(Kind::BadFormat, format!("{}: {error}", self.image.pinned)))
            }
            Err(error @ TreeError::Read(..)) => Err(local(self.image, error)),
        }
    }
}

/// Returns the size of the machine's memory in bytes.
fn memory() -> u64 {
    let system = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion)] // the type depends on the architecture
    u64::from(system.totalram).saturating_mul(system.mem_unit.into())
}

/// Takes the import lock. While another process holds it, `progress` shows the holder.
async fn lock(
    store: &NodeStore,
    image: &ResolvedImage,
    progress: &PullProgress,
    cancel: &CancellationToken,
) -> Result<StoreLock, Failure> {
    loop {
        match store.lock() {
            Ok(lock) => {
                progress.wait_for(None);
                return Ok(lock);
            }
            Err(error @ LockError::Io { .. }) => return Err(local(image, error)),
            Err(error @ LockError::Held { .. }) => {
                let held = error.to_string();
                if progress.waiting_for().as_ref() != Some(&held) {
                    tracing::info!(image = %image.pinned, "waiting: {held}");
                    progress.wait_for(Some(held));
                }
                tokio::select! {
                    () = cancel.cancelled() => {
                        progress.wait_for(None);
                        let message = format!("the pull of {} was cancelled while waiting: {error}", image.pinned);
                        return Err(Failure::new(Kind::Cancelled, message));
                    }
                    () = tokio::time::sleep(Duration::from_millis(200)) => {}
                }
            }
        }
    }
}

/// Returns the record of an earlier pull if it is valid for this one.
fn pulled_before(
    image: &ResolvedImage,
    store: &NodeStore,
    booted: Option<&BootedRepo>,
    options: &PullOptions,
) -> Result<Option<PulledImage>, Failure> {
    let Some(record) = store.read_record().map_err(|error| local(image, error))? else { return Ok(None) };
    // An unreadable record costs only a request to the registry.
    let Ok(record) = serde_json::from_slice::<PulledImage>(&record) else { return Ok(None) };
    // Another program may have removed refs or objects, and an older agent did not set the refs.
    let has_all = || restore_image_refs(store, image).and_then(|()| has_image(store, image));
    let holds = record.image.digest == image.digest
        && (!options.complete || record.complete && has_all().map_err(|error| local(image, error))?)
        && record.booted_commit == booted.and_then(|booted| booted.commit)
        && store.has(&record.commit, ObjectType::Commit)
        && store.resolve_ref().map_err(|error| local(image, error))? == Some(record.commit);
    Ok(holds.then(|| PulledImage { image: image.clone(), ..record }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only if the future is `Send`: the agent runs pulls as separate tasks.
    #[allow(dead_code)]
    fn a_pull_can_be_spawned(
        source: Arc<Source>,
        image: ResolvedImage,
        store: NodeStore,
    ) -> tokio::task::JoinHandle<Result<PulledImage, Failure>> {
        tokio::spawn(async move {
            let (options, progress) = (PullOptions::default(), Arc::default());
            pull(&source, &image, &store, None, &options, progress, &CancellationToken::new()).await
        })
    }
}
