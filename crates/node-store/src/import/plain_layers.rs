//! Decides when each plain layer of a run is read, and commits the merged tree.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::image::{Failure, ImageDescription, Kind, Layer, Layout};
use crate::store::{ObjectId, ObjectSet};

use super::base::Base;
use super::fetch::{fetch_plain, layer_name};
use super::plain::{BaseFacts, Committed, Derived, KeptTree, Merged, held_tree, over_budget, restore, store_layer};
use super::run::{DueRead, Read, Run, all_of, blocking};
use super::state::Import;
use super::wanted::is_kernel_layer;

/// The plain layers of an image, in order.
pub(super) struct PlainLayers<'a> {
    run: &'a Run<'a>,
    layers: &'a [Layer],
    parallel: usize,
    /// Facts by which the layers that are read first are read.
    first_facts: Option<BaseFacts>,
    /// Facts by which the other layers are read.
    facts: Option<BaseFacts>,
    trees: Vec<Option<Arc<KeptTree>>>,
    counted: HashSet<usize>,
}

impl<'a> PlainLayers<'a> {
    pub(super) fn new(run: &'a Run<'a>, layout: &'a Layout, parallel: usize) -> Self {
        let layers = layout.plain.as_slice();
        let trees = vec![None; layers.len()];
        Self { run, layers, parallel, first_facts: None, facts: None, trees, counted: HashSet::new() }
    }

    /// Returns the reads that are due once the objects of the base that they need are stored, and none before.
    ///
    /// The layers of a plain image with the SELinux policy are read at once, so that the files of all other layers get
    /// their final labels while they are read.
    pub(super) async fn when_ready(&mut self, fetched: &mut HashSet<usize>) -> Result<Vec<DueRead<'a>>, Failure> {
        if self.layers.is_empty() || self.facts.is_some() {
            return Ok(Vec::new());
        }
        let import = self.run.import.clone();
        let Some(mut facts) = blocking(self.run.image, move || BaseFacts::read(&import)).await?? else {
            return Ok(Vec::new());
        };
        let (first, mut rest): (Vec<_>, Vec<_>) =
            (0..self.layers.len()).partition(|at| self.is_first(&self.layers[*at]));
        if !first.is_empty() {
            self.first_facts = Some(facts.clone());
            let reads = self.unknown(&first, &facts).await?;
            all_of(reads, self.parallel, &self.run.import.decoders, |read| fetched.extend(self.note(read))).await?;
            facts = match self.with_policy(&facts).await? {
                Some(facts) => facts,
                None => {
                    let all = 0..self.layers.len();
                    self.read_again(all, |import, id| import.content_path(id).is_none(), fetched).await?;
                    // Objects that are still not stored are those of a policy that needs other layers.
                    self.with_policy(&facts).await?.unwrap_or(facts)
                }
            };
        }
        self.facts = Some(facts.clone());
        rest.sort_by_key(|at| is_kernel_layer(&self.layers[*at]));
        self.unknown(&rest, &facts).await
    }

    /// Returns true if a layer of a plain image is read before the others, because it has the SELinux policy.
    fn is_first(&self, layer: &Layer) -> bool {
        self.run.import.base == Base::Empty && has_policy(layer)
    }

    /// Returns the facts with the policy of the layers that were read so far, or `None` if objects of it are not stored.
    async fn with_policy(&self, facts: &BaseFacts) -> Result<Option<BaseFacts>, Failure> {
        let trees: Vec<_> = self.trees.iter().flatten().cloned().collect();
        let (import, facts) = (self.run.import.clone(), facts.clone());
        blocking(self.run.image, move || facts.with_policy_of(&import, &trees)).await?
    }

    /// Finds the trees of layers that an earlier run read or that the booted repo holds. Returns the reads of the others.
    async fn unknown(&mut self, positions: &[usize], facts: &BaseFacts) -> Result<Vec<DueRead<'a>>, Failure> {
        let mut reads = Vec::new();
        for at in positions.iter().copied() {
            let layer = &self.layers[at];
            let (import, facts_here, described) = (self.run.import.clone(), facts.clone(), layer.clone());
            let name = layer_name(self.run.image, layer);
            let known = blocking(self.run.image, move || known_tree(&import, &facts_here, &described, &name));
            match known.await?? {
                Some(tree) => {
                    self.trees[at] = Some(Arc::new(tree));
                    self.run.import.progress.reduce_total(layer.size());
                    self.count(layer.index);
                }
                None => reads.push(self.read(layer, facts.clone())),
            }
        }
        Ok(reads)
    }

    /// Records a finished read. Returns the position of the layer, or `None` if the layer was not needed.
    pub(super) fn note(&mut self, read: Read) -> Option<usize> {
        match read {
            Read::NotNeeded => None,
            Read::Encapsulated(index) => Some(index),
            Read::Plain(index, tree) => {
                if let Some(at) = self.layers.iter().position(|layer| layer.index == index) {
                    self.trees[at] = Some(Arc::new(tree));
                }
                self.count(index);
                Some(index)
            }
        }
    }

    /// Counts a layer as done. A layer that is read twice counts once.
    fn count(&mut self, index: usize) {
        if self.counted.insert(index) {
            self.run.import.progress.update(|now| now.layers_done += 1);
        }
    }

    /// Commits the merge of the base and the layers. Reads the layers that it needs for this.
    pub(super) async fn commit(
        mut self,
        description: &ImageDescription,
        fetched: &mut HashSet<usize>,
    ) -> Result<Derived, Failure> {
        let (run, parallel) = (self.run, self.parallel);
        let late = self.when_ready(fetched).await?;
        let Some(facts) = self.facts.clone() else {
            let message = format!("{} is incomplete: files of its SELinux policy are missing", run.image.pinned);
            return Err(Failure::new(Kind::BadFormat, message));
        };
        all_of(late, parallel, &self.run.import.decoders, |read| fetched.extend(self.note(read))).await?;
        if run.import.complete && run.import.base == Base::Empty {
            // An earlier run may have discarded objects that later layers hide. The commit of the first layer needs them,
            // and ostree-ext accepts no image without it.
            self.read_again(0..1, |import, id| import.content_path(id).is_none(), fetched).await?;
        }
        loop {
            let (import, layers) = (run.import.clone(), self.named()?);
            let merged = blocking(run.image, move || -> Result<_, Failure> {
                let merged = Merged::lay(&import, &layers)?;
                let open = import.retarget(merged.target(&import)?);
                Ok((merged, open))
            });
            let (merged, open) = merged.await??;
            self.fetch_open(&open, description, fetched).await?;
            let (import, facts_here, image) = (run.import.clone(), facts.clone(), run.image.clone());
            let described = description.clone();
            let commit = move || merged.commit(&import, &facts_here, &image, &described);
            match blocking(run.image, commit).await?? {
                Committed::Derived(mut derived) => {
                    let (import, target) = (run.import.clone(), std::mem::take(&mut derived.target));
                    let image = run.image.pinned.clone();
                    let restored = blocking(run.image, move || -> Result<(), Failure> {
                        restore(&import, &image, &target)?;
                        import.retarget(target);
                        Ok(())
                    });
                    restored.await??;
                    run.nothing_is_missing()?;
                    derived.layers = self.layer_commits().await?;
                    return Ok(*derived);
                }
                Committed::Needs(unknown) => {
                    let (count, image) = (unknown.len(), &run.image.pinned);
                    tracing::info!(count, %image, "fetching kernel modules whose SELinux labels may differ");
                    let open = run.import.want(&unknown);
                    self.fetch_open(&open, description, fetched).await?;
                }
            }
        }
    }

    /// Stores the commits of the layers. Returns them by the digest of the layer. An incomplete import into RAM needs none.
    async fn layer_commits(&self) -> Result<HashMap<String, ObjectId>, Failure> {
        let import = self.run.import.clone();
        let complete = import.is_complete();
        if !complete && !import.store.is_on_disk() {
            return Ok(HashMap::new());
        }
        let known = self.layers.iter().map(Layer::digest).zip(&self.trees);
        let trees: HashMap<_, _> = known.filter_map(|(digest, tree)| Some((digest, tree.clone()?))).collect();
        let store = move || {
            // Hidden objects are removed at the end of an incomplete import.
            let stays = |id: &ObjectId| import.has_content(id) && (complete || !import.is_hidden(id));
            let stored = trees.into_iter().map(|(digest, tree)| {
                let commit = store_layer(&import, &tree.tree(&import)?, &stays)?;
                Ok(commit.map(|commit| (digest, commit)))
            });
            stored.filter_map(Result::transpose).collect()
        };
        blocking(self.run.image, store).await?
    }

    /// Reads the layers that have objects which the merged tree still needs. A hardlink to a file under /usr/lib/modules
    /// may name objects that are not stored.
    async fn fetch_open(
        &mut self,
        open: &ObjectSet,
        description: &ImageDescription,
        fetched: &mut HashSet<usize>,
    ) -> Result<(), Failure> {
        let run = self.run;
        if !open.is_empty() {
            let open = open.clone();
            self.read_again(0..self.layers.len(), move |_, id| open.contains(id), fetched).await?;
        }
        run.rest_of_base(&description.layout, self.parallel, fetched).await?;
        run.nothing_is_missing()
    }

    /// Reads the layers at these positions again whose tree has an object for which `is_missing` returns true. The kept
    /// list of an earlier run may name objects that are not stored, because that run needed fewer or its objects were
    /// discarded.
    async fn read_again(
        &mut self,
        positions: Range<usize>,
        is_missing: impl Fn(&Import, &ObjectId) -> bool + Send + 'static,
        fetched: &mut HashSet<usize>,
    ) -> Result<(), Failure> {
        let (import, trees) = (self.run.import.clone(), self.trees.clone());
        let lacks = move |at: usize| match &trees[at] {
            Some(tree) => Ok(tree.tree(&import)?.has_object(&|id| is_missing(&import, id))),
            None => Ok(false),
        };
        let lacking = move || -> Result<Vec<usize>, Failure> {
            let all = positions.map(|at| Ok(lacks(at)?.then_some(at)));
            all.filter_map(Result::transpose).collect()
        };
        let lacking = blocking(self.run.image, lacking).await??;
        let mut reads = Vec::new();
        for at in lacking {
            let layer = &self.layers[at];
            // With other facts, the files of the layer would be other objects.
            let facts = if self.is_first(layer) { &self.first_facts } else { &self.facts };
            let Some(facts) = facts.clone() else { continue };
            // A tree and its successor must not use the budget at the same time.
            self.trees[at] = None;
            self.run.import.progress.update(|now| now.bytes_total += layer.size());
            reads.push(self.read(layer, facts));
        }
        all_of(reads, self.parallel, &self.run.import.decoders, |read| fetched.extend(self.note(read))).await
    }

    fn read(&self, layer: &'a Layer, facts: BaseFacts) -> DueRead<'a> {
        let run = self.run;
        async move {
            let started = std::time::Instant::now();
            let tree = fetch_plain(run, layer, &facts).await?;
            let (store, list) = (run.import.store.clone(), facts.list_name(&layer.diff_id));
            let kept = blocking(run.image, move || KeptTree::write(tree, list, &store)).await?;
            let kept = kept.map_err(|error| run.import.store_failure(&layer_name(run.image, layer), &error))?;
            let (digest, seconds) = (layer.digest(), started.elapsed().as_secs_f64());
            tracing::debug!(layer = layer.index, digest, size = layer.size(), seconds, "plain layer read");
            Ok(Read::Plain(layer.index, kept))
        }
        .boxed()
    }

    /// Returns the trees of all layers, with names for messages.
    fn named(&self) -> Result<Vec<(String, Arc<KeptTree>)>, Failure> {
        let named = self.layers.iter().zip(&self.trees).map(|(layer, tree)| {
            let name = layer_name(self.run.image, layer);
            let tree = tree.clone();
            tree.map(|tree| (name.clone(), tree))
                .ok_or_else(|| Failure::new(Kind::Local, format!("internal error: {name} was not read")))
        });
        named.collect()
    }
}

/// Returns the tree of a layer that an earlier run read or that the booted repo holds. `name` is that of the layer.
fn known_tree(import: &Import, facts: &BaseFacts, layer: &Layer, name: &str) -> Result<Option<KeptTree>, Failure> {
    let list = facts.list_name(&layer.diff_id);
    let found = KeptTree::find(&list, import).map_err(|error| import.local(error))?;
    if let Some(found) = found.map_err(|error| over_budget(name, &error))? {
        return Ok(Some(found));
    }
    let held = held_tree(import, facts, layer).map_err(|error| over_budget(name, &error))?;
    let kept = held.map(|tree| KeptTree::write(tree, list, &import.store)).transpose();
    kept.map_err(|error| import.store_failure(name, &error))
}

/// Returns true if a component of the layer is a package with an SELinux policy, as Fedora names them.
fn has_policy(layer: &Layer) -> bool {
    layer.components.iter().any(|name| name.rsplit('/').next().is_some_and(|name| name.starts_with("selinux-policy")))
}
