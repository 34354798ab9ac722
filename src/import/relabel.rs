//! Labels a merged tree by its own SELinux policy. Blocks.
//!
//! Rule, as libostree has it when ostree-ext commits a merged tree: where the policy has a label for a
//! path, that is the label, for base content as for derived; where it has none, things stay as they are.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;

use sha2::Digest;

use crate::image::{Failure, Kind};
use crate::store::{FileMeta, ObjectId, ObjectType, Xattrs};

use super::label::{Labels, Pairs, PolicyFiles, label_of, set_label};
use super::layertree::DirMeta;
use super::merge::{Content, Dir, Meta, read_dirmeta, read_dirtree};
use super::state::Import;

/// What an object on disk says about itself.
#[derive(Debug, Clone)]
struct Known {
    mode: u32,
    label: Option<Vec<u8>>,
}

/// Labels one tree.
pub(super) struct Relabeller<'a> {
    import: &'a Import,
    image: &'a str,
    labels: Labels,
    known: HashMap<ObjectId, Option<Known>>,
    metas: HashMap<ObjectId, DirMeta>,
    made: HashMap<(ObjectId, Vec<u8>), ObjectId>,
    of_base: u64,
}

impl<'a> Relabeller<'a> {
    pub(super) fn new(import: &'a Import, policy: &PolicyFiles, image: &'a str) -> Result<Self, Failure> {
        let labels =
            policy.open().map_err(|what| Failure::new(Kind::BadFormat, format!("the image {image}: {what}")))?;
        let (known, metas, made) = (HashMap::new(), HashMap::new(), HashMap::new());
        Ok(Self { import, image, labels, known, metas, made, of_base: 0 })
    }

    /// Says so when the base was not labelled by the image's policy: then nothing could be shared.
    pub(super) fn warning(&self) -> Option<String> {
        let count = self.of_base;
        (count > 0).then(|| {
            format!("{count} files of the base commit had other labels than the image's SELinux policy and were labelled anew")
        })
    }

    /// The objects that were copied with another label.
    pub(super) fn sources(&self) -> HashSet<ObjectId> {
        self.made.keys().map(|(id, _)| *id).collect()
    }

    /// Labels everything in a tree.
    pub(super) fn label(&mut self, root: &mut Dir) -> Result<(), Failure> {
        self.learn()?;
        self.dir(root, "/").map(drop)
    }

    /// Looks at all of the tree's content objects: thousands of system calls, on all CPUs.
    fn learn(&mut self) -> Result<(), Failure> {
        let ids = self.import.target_content();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let import = self.import;
        let part = |ids: &[ObjectId]| -> Result<Vec<_>, Failure> {
            ids.iter().map(|id| Ok((*id, look(import, id)?))).collect()
        };
        let part = &part;
        let parts = std::thread::scope(|scope| {
            let running: Vec<_> =
                ids.chunks(ids.len().div_ceil(threads).max(1)).map(|ids| scope.spawn(move || part(ids))).collect();
            running.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
        });
        for part in parts {
            self.known.extend(part.map_err(|_| import.local("a thread that looked at objects failed"))??);
        }
        Ok(())
    }

    /// Answers whether the directory is another one now.
    fn dir(&mut self, dir: &mut Dir, path: &str) -> Result<bool, Failure> {
        let mut changed = self.meta(&mut dir.meta, path)?;
        let import = self.import;
        let mut read = None;
        let (files, dirs) = match &mut dir.content {
            Content::Open { files, dirs } => (files, dirs),
            Content::Stored(tree) => {
                let lookup = &mut |id: &ObjectId, kind| import.read_metadata(id, kind);
                let listing = read_dirtree(tree, lookup).map_err(|error| import.tree_failure(&error))?;
                let (files, dirs) = read.insert(listing);
                (files, dirs)
            }
        };
        let mut inside = false;
        let at = |name: &str| if path == "/" { format!("/{name}") } else { format!("{path}/{name}") };
        for (name, id) in files.iter_mut() {
            inside |= self.file(id, &at(name))?;
        }
        for (name, child) in dirs.iter_mut() {
            inside |= self.dir(child, &at(name))?;
        }
        if inside && let Some((files, dirs)) = read {
            dir.content = Content::Open { files, dirs };
        }
        changed |= inside;
        Ok(changed)
    }

    fn meta(&mut self, meta: &mut Meta, path: &str) -> Result<bool, Failure> {
        const S_IFDIR: u32 = 0o040_000;
        let import = self.import;
        let mut current = match meta {
            Meta::New(meta) => meta.clone(),
            Meta::Stored(id) => match self.metas.get(id) {
                Some(meta) => meta.clone(),
                None => {
                    let lookup = &mut |id: &ObjectId, kind| import.read_metadata(id, kind);
                    let read = read_dirmeta(id, lookup).map_err(|error| import.tree_failure(&error))?;
                    self.metas.insert(*id, read.clone());
                    read
                }
            },
        };
        let Some(label) = self.lookup(path, S_IFDIR | current.mode)? else { return Ok(false) };
        if label_of(&current.xattrs) == Some(&label) {
            return Ok(false);
        }
        set_label(&mut current.xattrs, label);
        *meta = Meta::New(current);
        Ok(true)
    }

    fn file(&mut self, id: &mut ObjectId, path: &str) -> Result<bool, Failure> {
        // What is not here (kernel modules that nobody asked for) cannot be read, nor written anew.
        let Some(known) = self.known(id)? else { return Ok(false) };
        let Some(label) = self.lookup(path, known.mode)? else { return Ok(false) };
        if known.label.as_ref() == Some(&label) {
            return Ok(false);
        }
        self.of_base += u64::from(self.import.base_has(id));
        let key = (*id, label);
        *id = match self.made.get(&key) {
            Some(made) => *made,
            None => {
                let made = self.copy(id, path, &key.1)?;
                self.made.insert(key, made);
                made
            }
        };
        Ok(true)
    }

    fn known(&mut self, id: &ObjectId) -> Result<Option<Known>, Failure> {
        if let Some(known) = self.known.get(id) {
            return Ok(known.clone());
        }
        let known = look(self.import, id)?;
        self.known.insert(*id, known.clone());
        Ok(known)
    }

    /// The same file with another label. Written unless the booted repo has it.
    fn copy(&mut self, id: &ObjectId, at: &str, label: &[u8]) -> Result<ObjectId, Failure> {
        let import = self.import;
        let fail = |error: std::io::Error| import.local(format!("reading object {id}.file: {error}"));
        let Some(path) = import.store.find_object(id, ObjectType::File) else {
            return Err(import.local(format!("the object {id}.file vanished")));
        };
        let stat = path.symlink_metadata().map_err(fail)?;
        let mut xattrs = read_xattrs(&path).map_err(|errno| fail(errno.into()))?;
        set_label(&mut xattrs, label.to_vec());
        let target = match stat.file_type().is_symlink() {
            true => Some(std::fs::read_link(&path).map_err(fail)?.into_os_string().into_vec()),
            false => None,
        };
        let is_symlink = target.is_some();
        let meta = FileMeta {
            uid: stat.uid(),
            gid: stat.gid(),
            mode: stat.mode() & 0o7777,
            target,
            xattrs: Xattrs::from_pairs(xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))),
        };
        let write_failed = |error| import.write_failure(&format!("{}: labelling {at}", self.image), &error);
        let keep = |id: &ObjectId| import.keeps_at(id, at.trim_start_matches('/'));
        if is_symlink {
            let made = ObjectId(meta.hasher().finalize().into());
            if keep(&made) {
                import.writer.symlink(&made, &meta).map_err(write_failed)?;
                import.derived_stored(&made, 0);
            }
            return Ok(made);
        }
        let mut source = File::open(&path).map_err(fail)?;
        let mut file = import.writer.begin_unnamed(meta).map_err(write_failed)?;
        let mut piece = vec![0; 256 * 1024];
        loop {
            let count = source.read(&mut piece).map_err(fail)?;
            if count == 0 {
                break;
            }
            file.write(&piece[..count]).map_err(write_failed)?;
        }
        let (made, stored) = file.finish(keep).map_err(write_failed)?;
        if stored {
            import.derived_stored(&made, stat.len());
        }
        Ok(made)
    }

    fn lookup(&self, path: &str, mode: u32) -> Result<Option<Vec<u8>>, Failure> {
        self.labels
            .of(path, mode)
            .map_err(|what| Failure::new(Kind::BadFormat, format!("the image {}: {what}", self.image)))
    }
}

/// What an object on disk says about itself; `None` when it is not here.
fn look(import: &Import, id: &ObjectId) -> Result<Option<Known>, Failure> {
    let Some(path) = import.content_path(id) else { return Ok(None) };
    let fail = |error| import.local(format!("reading object {id}.file: {error}"));
    let mode = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(fail)?.mode(),
    };
    let label = read_xattr(&path, c"security.selinux").map_err(|errno| fail(errno.into()))?;
    Ok(Some(Known { mode, label }))
}

fn read_xattr(path: &std::path::Path, name: &std::ffi::CStr) -> Result<Option<Vec<u8>>, rustix::io::Errno> {
    use rustix::io::Errno;
    let mut short = [0; 256];
    match rustix::fs::lgetxattr(path, name, short.as_mut_slice()) {
        Ok(length) => return Ok(Some(short[..length].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
        Err(Errno::RANGE) => {}
        Err(errno) => return Err(errno),
    }
    // No attribute is larger than this (XATTR_SIZE_MAX).
    let mut value = vec![0; 65_536];
    let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice())?;
    value.truncate(length);
    Ok(Some(value))
}

fn read_xattrs(path: &std::path::Path) -> Result<Pairs, rustix::io::Errno> {
    let mut names = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let mut found = Vec::new();
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = std::ffi::CStr::from_bytes_with_nul(name) else { continue };
        if let Some(value) = read_xattr(path, name)? {
            found.push((name.to_bytes().to_vec(), value));
        }
    }
    Ok(found)
}
