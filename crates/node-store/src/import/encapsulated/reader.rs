//! Reads the archive of one encapsulated layer: stores metadata objects and wanted content objects, and skips the rest.
//! Blocks.
//!
//! Format source: ostree-ext's layer layout, formats 0 and 1 (see [`super::entry`]). In both, a content object follows
//! the entry that names its extended attributes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::image::{Failure, Kind};
use crate::store::{FileMeta, ObjectId, ObjectType, Xattrs};

use super::entry::{BadPath, Role, inside, role};
use crate::image::tarstream::{Chunks, Entry, Piece, TarError, TarStream};
use crate::import::base::Base;
use crate::import::state::Import;
use crate::import::tree::TreeError;

/// Maximum size of a metadata object in bytes, as in libostree.
const MAX_METADATA: u64 = 128 << 20;
/// Maximum size of one set of extended attributes in bytes.
const MAX_XATTRS: u64 = 1 << 20;
/// Maximum size of all extended attributes of a layer in bytes. They stay in memory while the layer is read.
const MAX_ALL_XATTRS: usize = 16 << 20;

/// Kinds of objects that a layer may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::import) enum Purpose {
    /// Commit, dirtrees, dirmetas and content.
    Commit,
    /// Content only.
    Chunk,
}

/// Data that must be stored only after the digest of the whole layer was checked.
#[derive(Debug, Default)]
pub(in crate::import) struct Consumed {
    /// The commit's detached metadata. Only the digest of the layer protects it.
    pub commit_meta: Option<(ObjectId, Vec<u8>)>,
    /// All content objects of the layer, also those that were not stored.
    pub content: Vec<ObjectId>,
}

/// Reads a layer to the end of its archive. `name` is for messages. Sets `contributed` when the first object of this
/// layer was stored.
pub(in crate::import) fn consume(
    import: &Import,
    name: &str,
    purpose: Purpose,
    contributed: &AtomicBool,
    chunks: impl Chunks,
) -> Result<Consumed, Failure> {
    let mut layer = LayerReader {
        import,
        name,
        purpose,
        contributed,
        tar: TarStream::new(chunks),
        xattrs: HashMap::new(),
        xattrs_size: 0,
        next: None,
        tree_tried: purpose == Purpose::Chunk,
        consumed: Consumed::default(),
    };
    layer.run()?;
    Ok(layer.consumed)
}

struct LayerReader<'a, C> {
    import: &'a Import,
    name: &'a str,
    purpose: Purpose,
    contributed: &'a AtomicBool,
    tar: TarStream<C>,
    xattrs: HashMap<ObjectId, Arc<Xattrs>>,
    xattrs_size: usize,
    /// Name and extended attributes of the content object that must follow.
    next: Option<(ObjectId, Arc<Xattrs>)>,
    tree_tried: bool,
    consumed: Consumed,
}

impl<C: Chunks> LayerReader<'_, C> {
    fn run(&mut self) -> Result<(), Failure> {
        while let Some(entry) = self.tar.next_entry().map_err(|error| self.tar_failure(&error))? {
            let role = role(&entry.path).map_err(|error| self.path_failure(&entry.path, error))?;
            match role {
                Role::Object(id, ObjectType::File) => {
                    self.before_content()?;
                    self.content(&entry, &id)?;
                }
                Role::Object(id, kind) => self.metadata(&entry, &id, kind)?,
                Role::Xattrs(id) => {
                    self.before_content()?;
                    let (actual, xattrs) = self.read_xattrs(&entry)?;
                    if actual != id {
                        let message = format!("{}: extended attributes {id} have the checksum {actual}", self.name);
                        return Err(Failure::new(Kind::BadDigest, message));
                    }
                    self.xattrs.insert(id, xattrs);
                }
                Role::XattrsLink(id) => {
                    self.before_content()?;
                    self.xattrs_link(&entry, id)?;
                }
                Role::Other => {
                    // Nothing is extracted, so that a bad link would be harmless. It is refused because the
                    // archive is probably hostile.
                    if entry.kind == EntryType::Link {
                        inside(&entry.link).map_err(|error| self.path_failure(&entry.link, error))?;
                    }
                }
            }
        }
        if let Some((id, _)) = &self.next {
            return Err(self.bad(format!("ends before the object {id}.file")));
        }
        Ok(())
    }

    /// Computes the wanted set before the first content object of the commit layer, because metadata come first. Very old
    /// images mix both: there, missing metadata are not an error.
    fn before_content(&mut self) -> Result<(), Failure> {
        if std::mem::replace(&mut self.tree_tried, true) {
            return Ok(());
        }
        match self.import.fix_wanted() {
            Ok(()) | Err(TreeError::Missing(..)) => Ok(()),
            Err(error) => Err(self.bad(error.to_string())),
        }
    }

    fn metadata(&mut self, entry: &Entry, id: &ObjectId, kind: ObjectType) -> Result<(), Failure> {
        let object = || format!("{id}.{}", kind.extension());
        if self.purpose != Purpose::Commit {
            return Err(self.bad(format!("has the object {} that belongs in the first layer", object())));
        }
        if !entry.is_regular() || entry.size > MAX_METADATA || entry.holes > 0 {
            return Err(self.bad(format!("has the object {} as a {:?} of {} bytes", object(), entry.kind, entry.size)));
        }
        if matches!(kind, ObjectType::Commit | ObjectType::CommitMeta) && Base::Commit(*id) != self.import.base {
            let expected = self.import.base;
            return Err(self.bad(format!("has the object {}, but the image's label names {expected}", object())));
        }
        let is_detached = kind == ObjectType::CommitMeta;
        if !is_detached && kind != ObjectType::Commit && !self.import.wants_metadata(id, kind) {
            return Ok(());
        }
        let mut buffer = Vec::new();
        self.tar.read_content(&mut buffer).map_err(|error| self.tar_failure(&error))?;
        if is_detached {
            self.consumed.commit_meta = Some((*id, buffer));
            return Ok(());
        }
        self.import.writer.metadata(id, kind, &buffer).map_err(|error| self.import.write_failure(self.name, &error))?;
        self.contributed.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn read_xattrs(&mut self, entry: &Entry) -> Result<(ObjectId, Arc<Xattrs>), Failure> {
        let path = entry.path.escape_ascii();
        if !entry.is_regular() || entry.size > MAX_XATTRS || entry.holes > 0 {
            return Err(self.bad(format!("has {path} as a {:?} of {} bytes", entry.kind, entry.size)));
        }
        let mut buffer = Vec::new();
        self.tar.read_content(&mut buffer).map_err(|error| self.tar_failure(&error))?;
        self.xattrs_size += buffer.len() + 64;
        if self.xattrs_size > MAX_ALL_XATTRS {
            return Err(self.bad("has more than 16 MiB of extended attributes".into()));
        }
        let xattrs =
            Xattrs::parse(&buffer).ok_or_else(|| self.bad(format!("has malformed extended attributes in {path}")))?;
        if xattrs.iter().any(|(name, value)| !Xattrs::can_be_set(name, value)) {
            return Err(self.bad(format!("has extended attributes in {path} that exceed the limits of Linux")));
        }
        let id = ObjectId(Sha256::digest(&buffer).into());
        Ok((id, Arc::new(xattrs)))
    }

    fn xattrs_link(&mut self, entry: &Entry, id: ObjectId) -> Result<(), Failure> {
        if let Some((other, _)) = &self.next {
            return Err(self.bad(format!("has extended attributes of {id}.file instead of the object {other}.file")));
        }
        let xattrs = if entry.kind == EntryType::Link {
            let target = role(&entry.link).map_err(|error| self.path_failure(&entry.link, error))?;
            let Role::Xattrs(name) = target else {
                let link = entry.link.escape_ascii();
                return Err(self.bad(format!("links the extended attributes of {id}.file to {link}")));
            };
            let known = self.xattrs.get(&name).cloned();
            known.ok_or_else(|| self.bad(format!("lacks the extended attributes {name} of {id}.file")))?
        } else {
            self.read_xattrs(entry)?.1
        };
        self.next = Some((id, xattrs));
        Ok(())
    }

    fn content(&mut self, entry: &Entry, id: &ObjectId) -> Result<(), Failure> {
        let named = self.next.take();
        self.consumed.content.push(*id);
        if !self.import.wants_content(id) {
            return Ok(());
        }
        let Some((_, xattrs)) = named.filter(|(name, _)| name == id) else {
            return Err(self.bad(format!("has the object {id}.file without its extended attributes")));
        };
        self.import.check_holes(&format!("{} {id}.file", self.name), entry.size, entry.holes)?;
        let target = match entry.kind {
            // libostree serialises the target of a symlink as a GVariant string, which is UTF-8.
            EntryType::Symlink if std::str::from_utf8(&entry.link).is_err() => {
                let target = entry.link.escape_ascii();
                return Err(self.bad(format!("has the object {id}.file, a symlink to {target}, which is not UTF-8")));
            }
            EntryType::Symlink => Some(entry.link.clone()),
            _ if entry.is_regular() => None,
            kind => return Err(self.bad(format!("has the object {id}.file as a {kind:?}"))),
        };
        let meta = FileMeta {
            uid: entry.uid,
            gid: entry.gid,
            // In format 0 the mode includes the file type, which the type of the entry already has.
            mode: entry.mode & 0o7777,
            target,
            xattrs: Xattrs::clone(&xattrs),
        };
        let writer = &self.import.writer;
        let written = if meta.target.is_some() {
            writer.symlink(id, &meta)
        } else {
            let fail = |error| self.import.write_failure(self.name, &error);
            let mut file = writer.begin(Some(*id), meta);
            loop {
                match self.tar.content() {
                    Ok(Some(Piece::Data(data))) => file.write(data).map_err(fail)?,
                    Ok(Some(Piece::Hole(length))) => file.hole(length).map_err(fail)?,
                    Ok(None) => break,
                    Err(error) => return Err(tar_failure(self.name, &error)),
                }
            }
            file.finish(|_| true).map(drop)
        };
        written.map_err(|error| self.import.write_failure(self.name, &error))?;
        self.contributed.store(true, Ordering::Relaxed);
        self.import.content_stored(id, entry.size);
        Ok(())
    }

    fn bad(&self, what: String) -> Failure {
        Failure::new(Kind::BadFormat, format!("{} {what}", self.name))
    }

    fn path_failure(&self, path: &[u8], error: BadPath) -> Failure {
        self.bad(format!("has the entry {}, which {error}", path.escape_ascii()))
    }

    fn tar_failure(&self, error: &TarError) -> Failure {
        tar_failure(self.name, error)
    }
}

/// Converts an error of the archive into a failure.
pub(in crate::import) fn tar_failure(name: &str, error: &TarError) -> Failure {
    let kind = if matches!(error, TarError::Truncated) { Kind::Truncated } else { Kind::BadFormat };
    Failure::new(kind, format!("{name}: {error}"))
}
