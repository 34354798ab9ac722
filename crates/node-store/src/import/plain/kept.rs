//! A layer's tree in the form that is kept between runs: JSON in zstd, one value after the other, parents before
//! children. Written and read piece by piece: as one text it would take several times the tree's memory. Pure.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use crate::store::ObjectId;

use super::children::Children;
use super::layertree::{BadEntry, DirMeta, LayerDir, LayerFile, LayerTree};
use crate::import::budget::Budget;

#[derive(Serialize, Deserialize)]
struct Notes {
    left_out: BTreeMap<String, u32>,
    unstorable: BTreeMap<ObjectId, String>,
}

/// A directory, and at which depth: its parent is the last one before it that is one higher.
#[derive(Serialize)]
struct Wrote<'a>(usize, &'a str, &'a DirMeta, bool, &'a Children<()>, &'a Children<LayerFile>);

#[derive(Deserialize)]
struct Kept(usize, String, DirMeta, bool, Children<()>, Children<LayerFile>);

impl LayerTree {
    /// Returns the form to keep.
    pub(in crate::import) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut out = zstd::stream::write::Encoder::new(Vec::new(), 1)?;
        serde_json::to_writer(
            &mut out,
            &Notes { left_out: self.left_out.clone(), unstorable: self.unstorable.clone() },
        )?;
        let mut queue = vec![(0, "", &self.root)];
        while let Some((depth, name, dir)) = queue.pop() {
            let LayerDir { meta, opaque, whiteouts, files, dirs } = dir;
            serde_json::to_writer(&mut out, &Wrote(depth, name, meta, *opaque, whiteouts, files))?;
            queue.extend(dirs.iter().map(|(name, dir)| (depth + 1, name, dir)));
        }
        out.finish()
    }

    /// Reads what [`LayerTree::to_bytes`] kept; `None` for what this version cannot read.
    ///
    /// # Errors
    /// When the budget has no room for it.
    pub(in crate::import) fn from_bytes(bytes: &[u8], budget: &Budget) -> Result<Option<Self>, BadEntry> {
        let Ok(decoder) = zstd::stream::read::Decoder::new(bytes) else { return Ok(None) };
        let mut tree = Self::new(budget);
        let mut input = serde_json::Deserializer::from_reader(io::BufReader::new(decoder));
        let Ok(notes) = Notes::deserialize(&mut input) else { return Ok(None) };
        (tree.left_out, tree.unstorable) = (notes.left_out, notes.unstorable);
        let mut path: Vec<String> = Vec::new();
        for dir in input.into_iter::<Kept>() {
            let Ok(Kept(depth, name, meta, opaque, whiteouts, files)) = dir else { return Ok(None) };
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
