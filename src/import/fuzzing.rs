//! Entrances for the fuzz targets in `fuzz/`: what reads hostile bytes, without a registry or a store.

use std::io;

use crate::image::tarstream::{Chunks, Piece, TarStream};
use crate::store::ObjectId;

use super::entry::{inside, role};
use super::layertree::{DirMeta, LayerFile, LayerTree};
use super::path::{Place, Placement, foreign};

struct Pieces<'a>(std::slice::Chunks<'a, u8>);

impl Chunks for Pieces<'_> {
    fn next(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.next().unwrap_or_default().to_vec())
    }
}

/// Reads an archive, in pieces of a size that its first byte says, content included.
pub fn tar(data: &[u8]) {
    let Some((size, data)) = data.split_first() else { return };
    let mut tar = TarStream::new(Pieces(data.chunks(usize::from(*size) * 7 + 1)));
    let (mut entries, mut content) = (0_usize, 0_usize);
    while let Ok(Some(entry)) = tar.next_entry() {
        entries += 1;
        let mut holes = 0;
        while let Ok(Some(piece)) = tar.content() {
            match piece {
                Piece::Data(data) => content += data.len(),
                Piece::Hole(length) => holes += length,
            }
        }
        assert!(holes <= entry.holes && entry.holes <= entry.size, "no more holes than were announced");
    }
    assert!(entries * 512 + content <= data.len(), "more came out than went in");
}

/// Reads an archive as a plain layer and as a chunk, and keeps and restores what the layer holds.
pub fn entries(data: &[u8]) {
    let placement = Placement { keep_var: data.len().is_multiple_of(2), any_top_level: data.len().is_multiple_of(3) };
    let mut tar = TarStream::new(Pieces(data.chunks(1000)));
    let mut tree = LayerTree::default();
    while let Ok(Some(entry)) = tar.next_entry() {
        let _ = (role(&entry.path), inside(&entry.link));
        let place = |path: &[u8]| placement.place(path);
        let Ok(Place::At(path)) = place(&entry.path) else { continue };
        let names = path.iter().map(|name| foreign(name).unwrap_or(name));
        assert!(names.clone().all(|name| !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])));
        let (uid, gid) = (entry.uid, entry.gid);
        // Each may refuse; none may panic or take for ever.
        if entry.kind == tar::EntryType::Directory {
            let _ = tree.directory(&path, DirMeta { uid, gid, mode: entry.mode & 0o7777, xattrs: entry.xattrs });
        } else if !matches!(tree.whiteout(&path, uid, gid), Ok(false)) {
            continue;
        } else if entry.kind == tar::EntryType::Link {
            if let Ok(Place::At(target)) = place(&entry.link) {
                let _ = tree.file(&path, LayerFile::Below(target), uid, gid);
            }
        } else {
            let _ = tree.file(&path, LayerFile::Object(ObjectId([7; 32])), uid, gid);
        }
    }
    if tree.resolve_links().is_ok()
        && let Ok(kept) = tree.to_bytes()
    {
        assert!(LayerTree::from_bytes(&kept) == Some(tree), "what is kept is what is restored");
    }
}

/// Reads the references of a release payload.
pub fn references(data: &[u8]) {
    let wanted = ["rhel-coreos".to_owned(), "stream-coreos".to_owned()];
    if let Ok(spec) = crate::image::references::node_image(data, &wanted) {
        assert!(spec.digest().is_some(), "only by digest");
    }
}
