//! Keeps the tree of a layer in the store, between runs and until the merge: a sequence of JSON values in zstd, parents
//! before children. Values are written and read one by one, because a single JSON text needs several times the memory of
//! the tree.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use crate::image::{Failure, Kind};
use crate::store::{DirMeta, NodeStore, ObjectId};

use super::children::Children;
use super::layertree::{BadEntry, LayerDir, LayerFile, LayerTree};
use crate::import::budget::{self, Share};
use crate::import::state::Import;

#[derive(Serialize, Deserialize)]
struct Notes {
    left_out: BTreeMap<String, u32>,
    unstorable: BTreeMap<ObjectId, String>,
}

/// Depth, name and content of a directory. Its parent is the last directory before it whose depth is one less.
#[derive(Serialize)]
struct WrittenDir<'a>(usize, &'a str, &'a DirMeta, [bool; 2], &'a Children<()>, &'a Children<LayerFile>);

#[derive(Deserialize)]
struct ReadDir(usize, String, DirMeta, [bool; 2], Children<()>, Children<LayerFile>);

impl LayerTree {
    /// Serialises the tree.
    pub(in crate::import) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut out = zstd::stream::write::Encoder::new(Vec::new(), 1)?;
        serde_json::to_writer(
            &mut out,
            &Notes { left_out: self.left_out.clone(), unstorable: self.unstorable.clone() },
        )?;
        let mut queue = vec![(0, "", &self.root)];
        while let Some((depth, name, dir)) = queue.pop() {
            let LayerDir { meta, named, opaque, whiteouts, files, dirs } = dir;
            serde_json::to_writer(&mut out, &WrittenDir(depth, name, meta, [*named, *opaque], whiteouts, files))?;
            queue.extend(dirs.iter().map(|(name, dir)| (depth + 1, name, dir)));
        }
        out.finish()
    }

    /// Deserialises the result of [`LayerTree::to_bytes`] into an empty tree. Returns `None` if the bytes are damaged or in
    /// the format of another version.
    ///
    /// # Errors
    /// If the tree exceeds the budget.
    pub(in crate::import) fn read(mut self, bytes: &[u8]) -> Result<Option<Self>, BadEntry> {
        let Ok(decoder) = zstd::stream::read::Decoder::new(bytes) else { return Ok(None) };
        let tree = &mut self;
        let mut input = serde_json::Deserializer::from_reader(io::BufReader::new(decoder));
        let Ok(notes) = Notes::deserialize(&mut input) else { return Ok(None) };
        (tree.left_out, tree.unstorable) = (notes.left_out, notes.unstorable);
        let mut path: Vec<String> = Vec::new();
        for dir in input.into_iter::<ReadDir>() {
            let Ok(ReadDir(depth, name, meta, [named, opaque], whiteouts, files)) = dir else { return Ok(None) };
            path.truncate(depth.saturating_sub(1));
            if depth > 0 {
                path.push(name);
            }
            if path.len() != depth {
                return Ok(None);
            }
            let meta = tree.meta(meta)?;
            let dir = LayerDir { meta, named, opaque, whiteouts, files, dirs: Children::default() };
            if !tree.restore(&path, dir)? {
                return Ok(None);
            }
        }
        Ok(Some(self))
    }
}

/// The tree of a layer in the store. Only one of these trees is in memory during the merge, so that the memory of a pull
/// does not grow with the number of layers.
#[derive(Debug)]
pub(in crate::import) struct KeptTree {
    name: String,
    _merged: Share,
}

impl KeptTree {
    /// Stores a tree under a name of [`super::BaseFacts::list_name`].
    pub(in crate::import) fn write(tree: LayerTree, name: String, store: &NodeStore) -> io::Result<Self> {
        store.write_layer_list(&name, tree.to_bytes()?)?;
        Ok(Self { name, _merged: tree.merged })
    }

    /// Returns the tree that an earlier run stored under this name, or `None` if there is none or it is damaged.
    ///
    /// # Errors
    /// If the tree exceeds the budget.
    pub(in crate::import) fn find(name: &str, import: &Import) -> io::Result<Result<Option<Self>, BadEntry>> {
        let Some(bytes) = import.store.read_layer_list(name)? else { return Ok(Ok(None)) };
        let tree = LayerTree::new(&import.budget).read(&bytes);
        Ok(tree.map(|tree| tree.map(|tree| Self { name: name.to_owned(), _merged: tree.merged })))
    }

    /// Reads the tree.
    pub(in crate::import) fn tree(&self, import: &Import) -> Result<LayerTree, Failure> {
        let bytes = import.store.read_layer_list(&self.name).map_err(|error| import.local(error))?;
        let tree = bytes.and_then(|bytes| LayerTree::counted(&import.budget).read(&bytes).transpose());
        let gone = || import.local(format!("the list {} of a layer disappeared during the pull", self.name));
        tree.ok_or_else(gone)?.map_err(|error| over_budget(&self.name, &error))
    }
}

/// Returns the failure of a list that exceeds the budget. `name` is that of the layer.
pub(in crate::import) fn over_budget(name: &str, error: &BadEntry) -> Failure {
    let message = format!("{name}: the list of its entries {error}");
    Failure { advice: budget::ADVICE, ..Failure::new(Kind::BadFormat, message) }
}
