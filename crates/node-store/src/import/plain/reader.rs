//! Reads the archive of one plain layer: stores file content as objects at once, and returns the rest as a [`LayerTree`].
//! Blocks.
//!
//! Format source: the OCI image layer specification; PAX headers for extended attributes.

use std::collections::HashSet;

use tar::EntryType;

use crate::image::{Failure, Kind};
use crate::store::{DirMeta, FileMeta, ObjectId, ObjectType, Pairs, S_IFDIR, WriteError, Xattrs, set_label};

use super::facts::BaseFacts;
use super::label::Labels;
use super::layertree::{BadEntry, LayerFile, LayerTree};
use super::path::{Place, shown};
use super::system::remove_left_by_build;
use crate::image::tarstream::{Chunks, Entry, Piece, TarError, TarStream};
use crate::import::base::Base;
use crate::import::budget;
use crate::import::encapsulated::{Role, role, tar_failure};
use crate::import::state::Import;

/// Maximum length of the target of a symlink in bytes (`PATH_MAX` without the NUL).
const MAX_TARGET: usize = 4095;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Reads a layer to the end of its archive. Stores the content objects that are needed, and returns the tree of the layer.
/// `name` is for messages.
pub(in crate::import) fn read_plain(
    import: &Import,
    name: &str,
    facts: &BaseFacts,
    chunks: impl Chunks,
) -> Result<LayerTree, Failure> {
    let bad = |what: String| Failure::new(Kind::BadFormat, format!("{name}: {what}"));
    let labels = facts.policy.as_ref().map(|policy| policy.open()).transpose().map_err(bad)?;
    let (tar, tree) = (TarStream::new(chunks), LayerTree::new(&import.budget));
    let mut layer = PlainReader { import, name, facts, labels, tar, tree, empty: HashSet::new() };
    while let Some(entry) = layer.tar.next_entry().map_err(|error| tar_failure(name, &error))? {
        layer.entry(&entry)?;
    }
    let PlainReader { mut tree, labels, empty, .. } = layer;
    tree.resolve_links().map_err(|(path, error)| bad(format!("the entry /{path} {error}")))?;
    if import.base == Base::Empty {
        remove_left_by_build(&mut tree, &|id| empty.contains(id));
    }
    if let Some(labels) = labels {
        tree.label_parents(&|path, mode| labels.of(path, mode).map_err(Unlabelled::Lookup))
            .map_err(|error| bad(error.to_string()))?;
    }
    Ok(tree)
}

struct PlainReader<'a, C> {
    import: &'a Import,
    name: &'a str,
    facts: &'a BaseFacts,
    labels: Option<Labels>,
    tar: TarStream<C>,
    tree: LayerTree,
    /// Objects of empty regular files.
    empty: HashSet<ObjectId>,
}

/// Reasons why a parent directory without an entry cannot be labelled.
#[derive(Debug, thiserror::Error)]
enum Unlabelled {
    #[error("{0}")]
    Lookup(String),
    #[error("its list of directories {0}")]
    Entry(#[from] BadEntry),
}

impl<C: Chunks> PlainReader<'_, C> {
    fn entry(&mut self, entry: &Entry) -> Result<(), Failure> {
        let path = match self.place(entry, &entry.path)? {
            Place::At(path) => path,
            Place::RepoObject(path) => {
                return self.repo_object(entry, path);
            }
            Place::Nowhere(top) => {
                self.tree.leave_out(top);
                return Ok(());
            }
        };
        let named = || shown(&path);
        match entry.kind {
            EntryType::Directory => {
                let meta = DirMeta {
                    uid: entry.uid,
                    gid: entry.gid,
                    mode: entry.mode & 0o7777,
                    xattrs: self.xattrs(entry, &named(), S_IFDIR)?,
                };
                self.tree.directory(&path, meta).map_err(|error| self.refused(entry, error))
            }
            EntryType::Symlink => {
                let file = self.symlink(entry, &named())?;
                self.put(entry, &path, LayerFile::Object(file))
            }
            kind if entry.is_regular() || kind == EntryType::Link => {
                let whiteout = self.tree.whiteout(&path, entry.uid, entry.gid);
                if whiteout.map_err(|error| self.refused(entry, error))? {
                    return Ok(());
                }
                let file = match kind {
                    EntryType::Link => self.link(entry)?,
                    _ => LayerFile::Object(self.regular(entry, &named())?),
                };
                self.put(entry, &path, file)
            }
            EntryType::Char | EntryType::Block => {
                self.tree.leave_out(format!("device /{}", named()));
                Ok(())
            }
            EntryType::Fifo => {
                self.tree.leave_out(format!("fifo /{}", named()));
                Ok(())
            }
            kind => Err(self.bad(entry, format!("has the unknown type {kind:?}"))),
        }
    }

    /// Reads an entry in the repo's object directory. In an encapsulated image, files are hardlinks to objects in this
    /// directory. A layer that changes such a file has an entry here, to which the names of the file are hardlinks. Or the
    /// entry here is a hardlink to one of the names.
    fn repo_object(&mut self, entry: &Entry, path: String) -> Result<(), Failure> {
        let file = match entry.kind {
            _ if entry.is_regular() => Some(LayerFile::Object(self.regular(entry, &path)?)),
            EntryType::Symlink => Some(LayerFile::Object(self.symlink(entry, &path)?)),
            EntryType::Link => Some(self.link(entry)?),
            _ => {
                self.tree.leave_out("/sysroot".into());
                None
            }
        };
        self.tree.repo_object(path, file).map_err(|error| self.refused(entry, error))
    }

    fn put(&mut self, entry: &Entry, path: &[String], file: LayerFile) -> Result<(), Failure> {
        self.tree.file(path, file, entry.uid, entry.gid).map_err(|error| self.refused(entry, error))
    }

    /// Returns the target of a hardlink.
    fn link(&self, entry: &Entry) -> Result<LayerFile, Failure> {
        match self.place(entry, &entry.link)? {
            Place::At(path) => Ok(LayerFile::Below(path)),
            Place::RepoObject(path) => match (self.tree.in_repo(&path), role(path.as_bytes())) {
                (Some(Some(file)), _) => Ok(file.clone()),
                (None, Ok(Role::Object(id, ObjectType::File))) => Ok(LayerFile::OfBase(id)),
                _ => Err(self.bad(entry, format!("is a hardlink to /{path}, which is not a content object"))),
            },
            Place::Nowhere(top) => {
                let target = entry.link.escape_ascii();
                Err(self.bad(
                    entry,
                    format!("is a hardlink to {target}, but files in {top} cannot be part of an ostree commit"),
                ))
            }
        }
    }

    fn symlink(&mut self, entry: &Entry, path: &str) -> Result<ObjectId, Failure> {
        let link = &entry.link;
        if link.is_empty() || link.contains(&0) || link.len() > MAX_TARGET {
            let what = format!(
                "is a symlink with an invalid target of {} bytes: expected 1 to {MAX_TARGET} bytes without NUL",
                link.len()
            );
            return Err(self.bad(entry, what));
        }
        let meta = self.meta(entry, path, Some(link.clone()))?;
        let id = ObjectId(sha2::Digest::finalize(meta.hasher()).into());
        if std::str::from_utf8(link).is_err() {
            // Refused after the merge, unless a later layer removes it.
            let target = link.escape_ascii().to_string();
            self.tree.unstorable(id, target).map_err(|error| self.refused(entry, error))?;
            return Ok(id);
        }
        if self.import.keeps_derived(&id, path) {
            let stored = self.import.writer.symlink(&id, &meta);
            stored.map_err(|error| self.write_failure(path, &error))?;
            self.import.derived_stored(&id, 0);
        }
        Ok(id)
    }

    fn regular(&mut self, entry: &Entry, path: &str) -> Result<ObjectId, Failure> {
        let meta = self.meta(entry, path, None)?;
        self.import.check_holes(&format!("{}: /{path}", self.name), entry.size, entry.holes)?;
        let fail = |error: &WriteError| self.import.write_failure(&format!("{}: /{path}", self.name), error);
        let mut file = self.import.writer.begin(None, meta);
        loop {
            match self.tar.content() {
                Ok(Some(Piece::Data(data))) => file.write(data).map_err(|error| fail(&error))?,
                Ok(Some(Piece::Hole(length))) => file.hole(length).map_err(|error| fail(&error))?,
                Ok(None) => break,
                Err(error) => return Err(self.tar_failure(&error)),
            }
        }
        let keep = |id: &ObjectId| self.import.keeps_derived(id, path);
        let (id, stored) = file.finish(keep).map_err(|error| fail(&error))?;
        if entry.size == 0 {
            self.empty.insert(id);
        }
        if stored {
            self.import.derived_stored(&id, entry.size);
        }
        Ok(id)
    }

    fn meta(&self, entry: &Entry, path: &str, target: Option<Vec<u8>>) -> Result<FileMeta, Failure> {
        let kind = if target.is_some() { S_IFLNK } else { S_IFREG };
        let xattrs = self.xattrs(entry, path, kind)?;
        let xattrs = Xattrs::from_pairs(xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())));
        Ok(FileMeta { uid: entry.uid, gid: entry.gid, mode: entry.mode & 0o7777, target, xattrs })
    }

    /// Returns the attributes of the entry. The label of the policy, if it has one, replaces the label of the archive.
    fn xattrs(&self, entry: &Entry, path: &str, kind: u32) -> Result<Pairs, Failure> {
        let mut xattrs = entry.xattrs.clone();
        if let Some((name, value)) = xattrs.iter().find(|(name, value)| !Xattrs::can_be_set(name, value)) {
            let (name, length) = (name.escape_ascii(), value.len());
            return Err(self
                .bad(entry, format!("has the attribute {name} of {length} bytes, which exceeds the limits of Linux")));
        }
        if let Some(labels) = &self.labels
            && let Some(label) = labels
                .of(&format!("/{path}"), kind | (entry.mode & 0o7777))
                .map_err(|what| Failure::new(Kind::BadFormat, format!("{}: {what}", self.name)))?
        {
            set_label(&mut xattrs, label);
        }
        Ok(xattrs)
    }

    fn place(&self, entry: &Entry, path: &[u8]) -> Result<Place, Failure> {
        self.facts.placement.place(path).map_err(|error| {
            let what = if path == entry.path {
                String::new()
            } else {
                format!("is a link to {}, which ", path.escape_ascii())
            };
            self.bad(entry, format!("{what}{error}"))
        })
    }

    fn refused(&self, entry: &Entry, error: BadEntry) -> Failure {
        let failure = self.bad(entry, &error);
        match error {
            BadEntry::TooMany(_) => Failure { advice: budget::ADVICE, ..failure },
            _ => failure,
        }
    }

    fn bad(&self, entry: &Entry, what: impl std::fmt::Display) -> Failure {
        let path = entry.path.escape_ascii();
        Failure::new(Kind::BadFormat, format!("{}: the entry {path} {what}", self.name))
    }

    fn write_failure(&self, path: &str, error: &WriteError) -> Failure {
        self.import.write_failure(&format!("{}: /{path}", self.name), error)
    }

    fn tar_failure(&self, error: &TarError) -> Failure {
        tar_failure(self.name, error)
    }
}
