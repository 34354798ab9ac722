//! Functions for the fuzz targets in `fuzz/`: they pass untrusted bytes to the parsers, without a registry. Compiled only
//! for tests and fuzzing.
//!
//! Any input may be refused. No input may cause a panic, an endless loop, an object whose name is not its checksum, or a
//! write outside the store.

mod seeds;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::image::TagHints;
use crate::image::tarstream::{Chunks, Piece, TarStream};
use crate::store::{NodeStore, ObjectId, ObjectType};

use super::base::Base;
use super::budget::Budget;
use super::encapsulated::{Purpose, Role, consume, role};
use super::plain::{BaseFacts, LayerTree, Placement, read_plain};
use super::state::Import;

pub use seeds::seeds;

/// Name and function of a fuzz target.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] =
    [("tar", tar), ("encapsulated", encapsulated), ("plain", plain), ("references", references)];

struct Pieces<'a>(std::slice::Chunks<'a, u8>);

impl Chunks for Pieces<'_> {
    fn next(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.next().unwrap_or_default().to_vec())
    }
}

/// Splits off the first byte, which sets the size of the pieces and the options of a target. Returns it and the pieces.
fn pieces(data: &[u8]) -> (u8, Pieces<'_>) {
    let (first, data) = data.split_first().unwrap_or((&0, data));
    (*first, Pieces(data.chunks(usize::from(*first) * 7 + 1)))
}

/// Reads an archive with its content.
pub fn tar(data: &[u8]) {
    let mut tar = TarStream::new(pieces(data).1);
    while let Ok(Some(entry)) = tar.next_entry() {
        let (mut content, mut holes) = (0, 0);
        while let Ok(Some(piece)) = tar.content() {
            match piece {
                Piece::Data(data) => content += data.len() as u64,
                Piece::Hole(length) => holes += length,
            }
        }
        assert!(holes <= entry.holes, "more holes than the entry declares");
        assert!(content + holes <= entry.size, "more content than the entry declares");
        assert!(content <= data.len() as u64, "more content than input");
    }
}

/// Imports an archive as the first layer of an image, and lists the tree of its commit.
pub fn encapsulated(data: &[u8]) {
    let (option, chunks) = pieces(data);
    let purpose = if option % 4 == 3 { Purpose::Chunk } else { Purpose::Commit };
    in_store(Base::Commit(first_commit(data)), |import| {
        let done = consume(import, "layer", purpose, &AtomicBool::new(false), chunks);
        if done.is_ok() && purpose == Purpose::Commit {
            let _ = import.fix_wanted();
        }
    });
}

/// Imports an archive as a plain layer, then serialises and deserialises its tree.
pub fn plain(data: &[u8]) {
    let (option, chunks) = pieces(data);
    let placement = Placement { keep_var: option & 1 != 0, any_top_level: option & 2 != 0 };
    in_store(Base::Empty, |import| {
        let Ok(tree) = read_plain(import, "layer", &BaseFacts::without_policy(placement), chunks) else { return };
        let bytes = tree.to_bytes().expect("serialise the tree");
        let restored = LayerTree::new(&import.budget).read(&bytes).ok().flatten().expect("deserialise the tree");
        assert_eq!(restored.to_bytes().expect("serialise the tree"), bytes);
    });
}

/// Reads the references of a release payload.
pub fn references(data: &[u8]) {
    let configured = Some(["rhel-coreos", "stream-coreos"].map(str::to_owned).to_vec());
    let hints = TagHints { configured, ..TagHints::default() };
    if let Ok((spec, _)) = crate::image::references::node_image(data, &hints) {
        assert!(spec.digest().is_some(), "a pull spec without a digest");
    }
}

/// Returns the first commit object of an archive, which the label of its image would name.
fn first_commit(data: &[u8]) -> ObjectId {
    let mut tar = TarStream::new(pieces(data).1);
    while let Ok(Some(entry)) = tar.next_entry() {
        if let Ok(Role::Object(id, ObjectType::Commit)) = role(&entry.path) {
            return id;
        }
    }
    ObjectId([0; 32])
}

/// Runs an import into an empty store in memory, then checks and removes all objects in it.
fn in_store(base: Base, run: impl FnOnce(&Import)) {
    thread_local!(static ROOT: Scratch = Scratch::new());
    ROOT.with(|Scratch(root)| {
        let store = NodeStore::on_tmpfs(root, None).expect("a store in memory");
        // A child process that another test starts may inherit the previous lock until it calls exec.
        let lock = (0..500)
            .find_map(|_| store.lock().inspect_err(|_| std::thread::sleep(std::time::Duration::from_millis(10))).ok());
        let lock = lock.expect("the import lock");
        let import = Import::new(base, &store, None, true, Budget::default(), Arc::default(), lock).expect("an import");
        run(&import);
        for prefix in fs::read_dir(store.repo_path().join("objects")).expect("objects").flatten() {
            for object in fs::read_dir(prefix.path()).expect("a prefix").flatten() {
                check(&store, &prefix.file_name().to_string_lossy(), &object.file_name().to_string_lossy());
                fs::remove_file(object.path()).expect("removing an object");
            }
        }
    });
}

/// Asserts that the object has the checksum of its name, according to libostree for files.
fn check(store: &NodeStore, prefix: &str, rest: &str) {
    let (rest, kind) = rest.split_once('.').expect("objects have a type");
    let kind = match kind {
        "file" => ostree::ObjectType::File,
        "dirtree" => ostree::ObjectType::DirTree,
        "dirmeta" => ostree::ObjectType::DirMeta,
        "commit" => ostree::ObjectType::Commit,
        other => panic!("stored an object of type {other}"),
    };
    let repo = ostree::Repo::new_for_path(store.repo_path());
    repo.open(ostree::gio::Cancellable::NONE).expect("a repo");
    let name = format!("{prefix}{rest}");
    if kind != ostree::ObjectType::File {
        use sha2::Digest;
        let bytes = fs::read(store.repo_path().join(format!("objects/{prefix}/{rest}.{}", ext(kind)))).expect("bytes");
        assert_eq!(hex::encode(sha2::Sha256::digest(bytes)), name, "wrong checksum of a metadata object");
        return;
    }
    repo.fsck_object(kind, &name, ostree::gio::Cancellable::NONE).expect("fsck finds nothing");
}

fn ext(kind: ostree::ObjectType) -> &'static str {
    match kind {
        ostree::ObjectType::DirTree => "dirtree",
        ostree::ObjectType::DirMeta => "dirmeta",
        _ => "commit",
    }
}

/// Directory on a tmpfs; removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let base = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let thread = format!("{:?}", std::thread::current().id()).replace(|c: char| !c.is_ascii_digit(), "");
        let root = base.join(format!("node-image-pivot-fuzz-{}-{thread}", std::process::id()));
        fs::create_dir_all(&root).expect("a scratch directory");
        Self(root)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Seeds are valid input, so that mutations start deep in the parsers. `make fuzz` runs this test with `FUZZ_CORPUS` to
    /// write them as the first corpus.
    #[test]
    fn seeds_are_accepted() {
        let corpus = std::env::var_os("FUZZ_CORPUS").map(PathBuf::from);
        for (target, name, bytes) in seeds() {
            if let Some(dir) = corpus.as_ref().map(|corpus| corpus.join(target)) {
                fs::create_dir_all(&dir).expect("a directory for the corpus");
                fs::write(dir.join(format!("seed-{name}")), &bytes).expect("a seed");
            }
            if name == "stream" {
                let found = crate::image::references::node_image(&bytes, &TagHints::default());
                assert!(found.is_ok(), "{name}: {found:?}");
            }
            if target == "encapsulated" {
                in_store(Base::Commit(first_commit(&bytes)), |import| {
                    let (option, chunks) = pieces(&bytes);
                    let purpose = if option % 4 == 3 { Purpose::Chunk } else { Purpose::Commit };
                    let done = consume(import, name, purpose, &AtomicBool::new(false), chunks);
                    assert!(done.is_ok(), "{name}: {done:?}");
                });
            }
            if target == "plain" {
                in_store(Base::Empty, |import| {
                    let facts = BaseFacts::without_policy(Placement { keep_var: true, any_top_level: false });
                    let done = read_plain(import, name, &facts, pieces(&bytes).1);
                    assert!(done.is_ok(), "{name}: {done:?}");
                });
            }
        }
    }

    /// Passes every seed and 50 mutations of it to its target. `make fuzz` does the same for longer, guided by coverage.
    #[test]
    fn mutated_seeds_do_not_panic() {
        let mut random = StdRng::seed_from_u64(1);
        for (target, _, seed) in seeds() {
            let (_, run) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target");
            run(&seed);
            for _ in 0..50 {
                let mut bytes = seed.clone();
                for _ in 0..random.random_range(1..6) {
                    mutate(&mut bytes, &mut random);
                }
                run(&bytes);
            }
        }
    }

    fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
        if bytes.is_empty() {
            return;
        }
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..5) {
            0 => bytes.truncate(at),
            1 => bytes[at] = random.random(),
            2 => bytes[at] ^= 1 << random.random_range(0..8),
            3 => {
                let end = (at + 512).min(bytes.len());
                let block = bytes[at..end].to_vec();
                let to = random.random_range(0..bytes.len());
                bytes.splice(to..to, block);
            }
            _ => {
                let end = (at + random.random_range(1..600)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
}
