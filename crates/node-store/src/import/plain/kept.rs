//! Serialises the tree of a layer, to keep it between runs: a sequence of JSON values in zstd, parents before children.
//! Values are written and read one by one, because a single JSON text needs several times the memory of the tree. Pure.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use crate::store::ObjectId;

use super::children::Children;
use super::dirmeta::DirMeta;
use super::layertree::{BadEntry, LayerDir, LayerFile, LayerTree};
use crate::import::budget::Budget;

#[derive(Serialize, Deserialize)]
struct Notes {
    left_out: BTreeMap<String, u32>,
    unstorable: BTreeMap<ObjectId, String>,
}

/// Depth, name and content of a directory. Its parent is the last directory before it whose depth is one less.
#[derive(Serialize)]
struct WrittenDir<'a>(usize, &'a str, &'a DirMeta, bool, &'a Children<()>, &'a Children<LayerFile>);

#[derive(Deserialize)]
struct ReadDir(usize, String, DirMeta, bool, Children<()>, Children<LayerFile>);

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
            let LayerDir { meta, opaque, whiteouts, files, dirs } = dir;
            serde_json::to_writer(&mut out, &WrittenDir(depth, name, meta, *opaque, whiteouts, files))?;
            queue.extend(dirs.iter().map(|(name, dir)| (depth + 1, name, dir)));
        }
        out.finish()
    }

    /// Deserialises the result of [`LayerTree::to_bytes`]. Returns `None` if the bytes are damaged or in the format of
    /// another version.
    ///
    /// # Errors
    /// If the tree exceeds the budget.
    pub(in crate::import) fn from_bytes(bytes: &[u8], budget: &Budget) -> Result<Option<Self>, BadEntry> {
        let Ok(decoder) = zstd::stream::read::Decoder::new(bytes) else { return Ok(None) };
        let mut tree = Self::new(budget);
        let mut input = serde_json::Deserializer::from_reader(io::BufReader::new(decoder));
        let Ok(notes) = Notes::deserialize(&mut input) else { return Ok(None) };
        (tree.left_out, tree.unstorable) = (notes.left_out, notes.unstorable);
        let mut path: Vec<String> = Vec::new();
        for dir in input.into_iter::<ReadDir>() {
            let Ok(ReadDir(depth, name, meta, opaque, whiteouts, files)) = dir else { return Ok(None) };
            path.truncate(depth.saturating_sub(1));
            if depth > 0 {
                path.push(name);
            }
            if path.len() != depth {
                return Ok(None);
            }
            let meta = tree.meta(meta)?;
            let dir = LayerDir { meta, opaque, whiteouts, files, dirs: Children::default() };
            if !tree.restore(&path, dir)? {
                return Ok(None);
            }
        }
        Ok(Some(tree))
    }
}
