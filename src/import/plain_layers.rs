//! The plain layers of one run: which are read when, and what is made of them.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::image::{Failure, ImageDescription, Kind, Layer, Layout};
use crate::report::PullProgress;

use super::derive::{Derived, Merged, objects_of};
use super::facts::BaseFacts;
use super::fetch::{fetch_plain, layer_name};
use super::layertree::LayerTree;
use super::run::{DueRead, Read, Run, all_of, blocking, local};

/// The plain layers of an image, in order.
pub(super) struct PlainLayers<'a> {
    run: &'a Run<'a>,
    layers: &'a [Layer],
    parallel: usize,
    facts: Option<BaseFacts>,
    trees: Vec<Option<Arc<LayerTree>>>,
    counted: HashSet<usize>,
}

impl<'a> PlainLayers<'a> {
    pub(super) fn new(run: &'a Run<'a>, layout: &'a Layout, parallel: usize) -> Self {
        let layers = layout.derived.as_slice();
        Self { run, layers, parallel, facts: None, trees: vec![None; layers.len()], counted: HashSet::new() }
    }

    /// The reads that are due, when what they need of the base is there; none otherwise.
    pub(super) async fn when_ready(&mut self) -> Result<Vec<DueRead<'a>>, Failure> {
        if self.layers.is_empty() || self.facts.is_some() {
            return Ok(Vec::new());
        }
        let import = self.run.import.clone();
        let Some(facts) = blocking(self.run.image, move || BaseFacts::read(&import)).await?? else {
            return Ok(Vec::new());
        };
        self.facts = Some(facts.clone());
        let mut reads = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            // A list that this version cannot read only costs another look at the layer.
            let kept = self.run.import.store.read_layer_list(&facts.list_name(&layer.diff_id));
            let kept = kept.map_err(|error| local(self.run.image, error))?;
            match kept.and_then(|bytes| LayerTree::from_bytes(&bytes)) {
                Some(tree) => {
                    self.trees[at] = Some(Arc::new(tree));
                    PullProgress::sub(&self.run.import.progress.bytes_total, layer.size());
                }
                None => reads.push(self.read(layer, facts.clone())),
            }
        }
        Ok(reads)
    }

    /// Takes what was read; the layer's position when it was read whole.
    pub(super) fn note(&mut self, read: Read) -> Option<usize> {
        match read {
            Read::NotNeeded => None,
            Read::Encapsulated(index) => Some(index),
            Read::Plain(index, tree) => {
                if let Some(at) = self.layers.iter().position(|layer| layer.index == index) {
                    self.trees[at] = Some(Arc::new(tree));
                }
                // One that is read again because of what an earlier run left out counts once.
                if self.counted.insert(index) {
                    PullProgress::add(&self.run.import.progress.layers_done, 1);
                }
                Some(index)
            }
        }
    }

    /// Makes a commit of the base and the layers, reading what is missing.
    pub(super) async fn commit(
        mut self,
        description: &ImageDescription,
        fetched: &mut HashSet<usize>,
    ) -> Result<Derived, Failure> {
        let (run, parallel) = (self.run, self.parallel);
        let mut late = self.when_ready().await?;
        let Some(facts) = self.facts.clone() else {
            let message = format!("{}: files of its SELinux policy are missing", run.image.pinned);
            return Err(Failure::new(Kind::BadFormat, message));
        };
        let mut read_again = HashSet::new();
        loop {
            all_of(late, parallel, |read| fetched.extend(self.note(read))).await?;
            let layers = self.named()?;
            let (import, laid) = (run.import.clone(), layers.clone());
            let merged = blocking(run.image, move || -> Result<_, Failure> {
                let merged = Merged::lay(&import, &laid)?;
                let open = import.retarget(merged.target(&import)?);
                Ok((merged, open))
            });
            let (merged, open) = merged.await??;
            // A list of an earlier run, with another idea of what to keep, may name objects that are not
            // here. So may a hardlink to what lies under /usr/lib/modules.
            let again: Vec<&Layer> = self
                .layers
                .iter()
                .zip(&layers)
                .filter(|(layer, _)| !read_again.contains(&layer.index))
                .filter(|(_, (_, tree))| !objects_of(tree).is_disjoint(&open))
                .map(|(layer, _)| layer)
                .collect();
            if open.is_empty() || again.is_empty() {
                run.nothing_is_missing()?;
                let (import, facts, image) = (run.import.clone(), facts.clone(), run.image.clone());
                let description = description.clone();
                let work = move || {
                    let derived = merged.commit(&import, &facts, &image, &description, &layers)?;
                    import.retarget(derived.target.clone());
                    Ok(derived)
                };
                let derived: Derived = blocking(run.image, work).await??;
                run.nothing_is_missing()?;
                return Ok(derived);
            }
            read_again.extend(again.iter().map(|layer| layer.index));
            let bytes = again.iter().map(|layer| layer.size()).sum();
            PullProgress::add(&run.import.progress.bytes_total, bytes);
            late = again.into_iter().map(|layer| self.read(layer, facts.clone())).collect();
        }
    }

    fn read(&self, layer: &'a Layer, facts: BaseFacts) -> DueRead<'a> {
        let run = self.run;
        async move {
            let started = std::time::Instant::now();
            let tree = fetch_plain(run.source, run.image, layer, &facts, run.import, run.cancel).await?;
            let list = tree.to_bytes().map_err(|error| local(run.image, error))?;
            let kept = run.import.store.write_layer_list(&facts.list_name(&layer.diff_id), &list);
            kept.map_err(|error| run.import.store_failure(&layer_name(run.image, layer), &error))?;
            let (digest, seconds) = (layer.digest(), started.elapsed().as_secs_f64());
            tracing::debug!(layer = layer.index, digest, size = layer.size(), seconds, "plain layer read");
            Ok(Read::Plain(layer.index, tree))
        }
        .boxed()
    }

    /// The layers' trees with names for messages.
    fn named(&self) -> Result<Vec<(String, Arc<LayerTree>)>, Failure> {
        let named = self.layers.iter().zip(&self.trees).map(|(layer, tree)| {
            let name = layer_name(self.run.image, layer);
            let tree = tree.clone();
            tree.map(|tree| (name.clone(), tree))
                .ok_or_else(|| Failure::new(Kind::Local, format!("{name}: it was not read")))
        });
        named.collect()
    }
}
