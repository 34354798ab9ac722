//! Labels a merged tree with its own SELinux policy. Blocks.
//!
//! The rule is that of libostree when ostree-ext commits a merged tree: if the policy has a label for a path, the entry
//! gets it, whether it comes from the base or a layer. Otherwise the entry is unchanged, except for a label of the booted
//! policy, by which the layers of a plain image were read.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use sha2::Digest;
use support::{if_found, xattr};

use crate::image::{Failure, Kind, PullSpec};
use crate::store::{DirMeta, FileMeta, ObjectId, ObjectType, S_IFDIR, SELINUX, Xattrs, label_of, set_label};

use super::label::{Labels, PolicyFiles};
use super::merge::Meta;
use crate::import::base::Base;
use crate::import::replaced::Replacement;
use crate::import::state::Import;
use crate::import::tree::{Target, read_dirmeta};

/// Mode and label of a stored object.
#[derive(Debug, Clone)]
struct Known {
    mode: u32,
    label: Option<Label>,
    /// True if a path seen so far has the object without a change.
    used: bool,
}

/// Shared label: a tree has only some hundred distinct ones.
type Label = Arc<[u8]>;

/// Labels by the policy of the base commit.
enum BaseLabels {
    /// Its policy equals that of the tree.
    Same,
    /// Its policy differs from that of the tree.
    Other(Labels),
    /// The base has no policy.
    None,
}

/// Labels one tree.
pub(super) struct Relabeller<'a> {
    import: &'a Import,
    image: &'a PullSpec,
    labels: Labels,
    base: BaseLabels,
    known: HashMap<ObjectId, Option<Known>>,
    seen: HashSet<Label>,
    metas: HashMap<ObjectId, DirMeta>,
    made: HashMap<(ObjectId, Option<Label>), ObjectId>,
    /// Relabelled copies that were not stored, because no path seen so far needs them in the store.
    unstored: HashSet<ObjectId>,
    /// Objects of the policies, which libselinux reads by their names.
    policies: HashSet<ObjectId>,
    /// Objects with several names. Another name may use such an object without a change.
    several: HashSet<ObjectId>,
    /// Number of base files that got another label.
    relabelled_base: u64,
    /// Base objects that neither repo has; true if the two policies label them differently.
    absent: HashMap<ObjectId, bool>,
    /// True if the base has files whose label differs from that of its own policy.
    base_is_mislabelled: bool,
}

impl<'a> Relabeller<'a> {
    /// Opens the tree's policy and reads the labels of all content objects. `base` is the policy of the base commit,
    /// `several` has the objects with several names.
    pub(super) fn new(
        import: &'a Import,
        policy: &PolicyFiles,
        base: Option<&PolicyFiles>,
        several: HashSet<ObjectId>,
        image: &'a PullSpec,
    ) -> Result<Self, Failure> {
        let open = |policy: &PolicyFiles| {
            policy.open().map_err(|what| Failure::new(Kind::BadFormat, format!("the image {image}: {what}")))
        };
        let mut this = Self {
            import,
            image,
            labels: open(policy)?,
            base: match base {
                None => BaseLabels::None,
                Some(base) if base.objects == policy.objects => BaseLabels::Same,
                Some(base) => BaseLabels::Other(open(base)?),
            },
            known: HashMap::new(),
            seen: HashSet::new(),
            metas: HashMap::new(),
            made: HashMap::new(),
            unstored: HashSet::new(),
            policies: policy.objects.ids().chain(base.iter().flat_map(|base| base.objects.ids())).copied().collect(),
            several,
            relabelled_base: 0,
            absent: HashMap::new(),
            base_is_mislabelled: false,
        };
        this.read_labels()?;
        Ok(this)
    }

    /// Returns a warning if base files were relabelled, because these are stored twice.
    pub(super) fn warning(&self) -> Option<String> {
        let count = self.relabelled_base;
        (count > 0).then(|| {
            format!(
                "relabelled {count} files of the base commit, whose labels differed from the image's SELinux policy"
            )
        })
    }

    /// Returns the objects of which relabelled copies were made.
    pub(super) fn sources(&self) -> HashSet<ObjectId> {
        self.made.keys().map(|(id, _)| *id).collect()
    }

    /// Returns the missing objects whose label may differ from that of the tree's policy: kernel modules that a delta pull
    /// skipped. Their relabelled copies, and so the commit, cannot be computed without them.
    pub(super) fn unknown(&self) -> HashSet<ObjectId> {
        let of_base = |id: &ObjectId| self.base_is_mislabelled && self.import.base_has(id);
        self.absent.iter().filter(|(id, differs)| **differs || of_base(id)).map(|(id, _)| *id).collect()
    }

    /// Reads the labels of all content objects of the tree, with one thread for each CPU.
    fn read_labels(&mut self) -> Result<(), Failure> {
        let ids = self.import.target_content();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let import = self.import;
        let part = |ids: &[ObjectId]| -> Result<Vec<_>, Failure> {
            ids.iter().map(|id| Ok((*id, read_label(import, id)?))).collect()
        };
        let part = &part;
        // In portions, because equal labels share memory only after `note`.
        for portion in ids.chunks(16 * 1024) {
            let parts = std::thread::scope(|scope| {
                let size = portion.len().div_ceil(threads).max(1);
                let running: Vec<_> = portion.chunks(size).map(|ids| scope.spawn(move || part(ids))).collect();
                running.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
            });
            for part in parts {
                for (id, known) in
                    part.map_err(|_| import.local("internal error: a thread that reads labels failed"))??
                {
                    self.note(id, known);
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, id: ObjectId, known: ModeAndLabel) -> Option<Known> {
        let known =
            known.map(|(mode, label)| Known { mode, label: label.map(|label| self.shared(label)), used: false });
        self.known.insert(id, known.clone());
        known
    }

    fn shared(&mut self, label: Vec<u8>) -> Label {
        if let Some(known) = self.seen.get(label.as_slice()) {
            return known.clone();
        }
        let label = Label::from(label);
        self.seen.insert(label.clone());
        label
    }

    /// Returns the metadata of a directory with the label of `path`, or `None` if they need not change.
    pub(super) fn meta(&mut self, meta: &Meta, path: &str) -> Result<Option<DirMeta>, Failure> {
        let import = self.import;
        let current: &DirMeta = match meta {
            Meta::New(meta) => meta,
            Meta::Stored(id) => match self.metas.entry(*id) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let lookup = &mut |id: &ObjectId, kind| import.read_metadata(id, kind);
                    new.insert(read_dirmeta(id, lookup).map_err(|error| import.tree_failure(&error))?)
                }
            },
        };
        let current = current.clone();
        let change = self.change(path, S_IFDIR | current.mode, label_of(&current.xattrs))?;
        Ok(change.map(|label| {
            let mut new = current;
            match label {
                Some(label) => set_label(&mut new.xattrs, label),
                None => new.xattrs.retain(|(name, _)| name != SELINUX),
            }
            new
        }))
    }

    /// Returns the label that replaces the label `now` of an entry at `path`, or `None` if it stays.
    fn change(&self, path: &str, mode: u32, now: Option<&[u8]>) -> Result<Option<Option<Vec<u8>>>, Failure> {
        let label = lookup(&self.labels, self.image, path, mode)?;
        Ok(match label {
            Some(_) if label.as_deref() == now => None,
            Some(_) => Some(label),
            None if now.is_some() && self.is_guess(path, mode, now)? => Some(None),
            None => None,
        })
    }

    /// Returns true if the label can only be that of the policy by which the layers of a plain image were read.
    fn is_guess(&self, path: &str, mode: u32, label: Option<&[u8]>) -> Result<bool, Failure> {
        Ok(self.import.base == Base::Empty && self.by_base(path, mode, None)?.as_deref() == label)
    }

    /// Returns the object that equals `id` except for the label of `path`. Writes it if necessary.
    pub(super) fn file(&mut self, id: &ObjectId, path: &str) -> Result<ObjectId, Failure> {
        let known = match self.known.get(id) {
            Some(known) => known.clone(),
            None => {
                let known = read_label(self.import, id)?;
                self.note(*id, known)
            }
        };
        let Some(known) = known else {
            self.note_absent(id, path)?;
            return Ok(*id);
        };
        let Some(label) = self.change(path, known.mode, known.label.as_deref())? else {
            if let Some(Some(known)) = self.known.get_mut(id) {
                known.used = true;
            }
            return Ok(*id);
        };
        if self.import.base_has(id) {
            self.relabelled_base += 1;
            self.base_is_mislabelled |=
                self.by_base(path, known.mode, label.as_deref())?.as_deref() != known.label.as_deref();
        }
        if let Some(Replacement { copy, .. }) = self.import.replacement(id)
            && read_label(self.import, &copy)?.is_some_and(|(_, of_copy)| of_copy == label)
        {
            return Ok(copy);
        }
        let key = (*id, label.map(|label| self.shared(label)));
        let is_kept = |made: &ObjectId| self.import.keeps_at(made, path.trim_start_matches('/'));
        if let Some(made) = self.made.get(&key)
            && !(self.unstored.contains(made) && is_kept(made))
        {
            return Ok(*made);
        }
        let made = copy(self.import, self.image, id, path, key.1.as_deref(), &is_kept)?;
        if is_kept(&made) {
            self.unstored.remove(&made);
        } else {
            self.unstored.insert(made);
        }
        if self.several.contains(id) || !self.replace(id, &made, &known)? {
            self.made.insert(key, made);
        }
        Ok(made)
    }

    /// Removes the first objects of files with several names, if all names got another label.
    pub(super) fn finish(&self) -> Result<(), Failure> {
        for ((id, _), made) in &self.made {
            if let Some(Some(known)) = self.known.get(id) {
                self.replace(id, made, known)?;
            }
        }
        Ok(())
    }

    /// Removes an object of a plain layer that only the copy `made` needs, so that the store has its content once. Returns
    /// false if the object stays.
    fn replace(&self, id: &ObjectId, made: &ObjectId, known: &Known) -> Result<bool, Failure> {
        let import = self.import;
        let is_needed = known.used || self.policies.contains(id) || import.base_has(id);
        let has = |id: &ObjectId| import.store.has(id, ObjectType::File);
        if is_needed || !import.is_unpublished(id) || !has(id) || !import.has_content(made) {
            return Ok(false);
        }
        let replaced = import.replace(id, Replacement { copy: *made, label: known.label.clone() });
        replaced.map_err(|error| import.store_failure(&format!("{}: relabelling its files", self.image), &error))?;
        Ok(true)
    }

    /// Records an object that a delta pull skipped, and whether the two policies label it differently.
    fn note_absent(&mut self, id: &ObjectId, path: &str) -> Result<(), Failure> {
        // The type is in the missing object: try a file and a symlink.
        for mode in [0o100_644, 0o120_777] {
            let label = lookup(&self.labels, self.image, path, mode)?;
            let by_base = self.by_base(path, mode, label.as_deref())?;
            let differs = label != by_base && (label.is_some() || self.import.base == Base::Empty);
            *self.absent.entry(*id).or_default() |= differs;
        }
        Ok(())
    }

    /// Returns the label by the base's policy. `label` is the label by the tree's policy.
    fn by_base(&self, path: &str, mode: u32, label: Option<&[u8]>) -> Result<Option<Vec<u8>>, Failure> {
        match &self.base {
            BaseLabels::Same => Ok(label.map(<[u8]>::to_vec)),
            BaseLabels::Other(base) => lookup(base, self.image, path, mode),
            BaseLabels::None => Ok(None),
        }
    }
}

/// Stores the objects of `target` again that were removed after they had been copied: an image with the same layer may
/// need them.
pub(in crate::import) fn restore(import: &Import, image: &PullSpec, target: &Target) -> Result<(), Failure> {
    for id in target.content.keys() {
        if let Some(Replacement { label, .. }) = import.replacement(id) {
            copy(import, image, id, &format!("the object {id}.file"), label.as_deref(), &|_| true)?;
        }
    }
    Ok(())
}

/// Returns the name of a copy of the object with another label. Writes it if `keep` returns true for that name.
fn copy(
    import: &Import,
    image: &PullSpec,
    id: &ObjectId,
    at: &str,
    label: Option<&[u8]>,
    keep: &dyn Fn(&ObjectId) -> bool,
) -> Result<ObjectId, Failure> {
    let fail = |error: io::Error| import.local(format!("cannot read the object {id}.file: {error}"));
    let Some(path) = import.content_path(id) else {
        return Err(import.local(format!("the object {id}.file disappeared during the pull")));
    };
    let stat = path.symlink_metadata().map_err(fail)?;
    let xattrs = xattr::read(&path).map_err(|errno| fail(errno.into()))?;
    let target = match stat.file_type().is_symlink() {
        true => Some(std::fs::read_link(&path).map_err(fail)?.into_os_string().into_vec()),
        false => None,
    };
    let is_symlink = target.is_some();
    let labelled = |label: Option<&[u8]>| {
        let others = xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
        let others = others.filter(|(name, _)| *name != xattr::LABEL);
        let xattrs = Xattrs::from_pairs(others.chain(label.map(|label| (xattr::LABEL, label))));
        FileMeta { uid: stat.uid(), gid: stat.gid(), mode: stat.mode() & 0o7777, target: target.clone(), xattrs }
    };
    let reported = xattrs.get(xattr::LABEL).map(Vec::as_slice);
    if import.booted_file(id).is_some() && !reported.is_some_and(is_unknown) {
        // The kernel reports a label of an object that was written without one.
        let before = [labelled(reported), labelled(None)];
        if !before.iter().try_fold(false, |found, meta| Ok(found || has_checksum(&path, meta, id)?)).map_err(fail)? {
            return Err(damaged(import, id, at));
        }
    }
    let meta = labelled(label);
    let write_failed = |error| import.write_failure(&format!("{image}: relabelling {at}"), &error);
    if is_symlink {
        let made = ObjectId(meta.hasher().finalize().into());
        if keep(&made) {
            import.writer.symlink(&made, &meta).map_err(write_failed)?;
            import.derived_stored(&made, 0);
        }
        return Ok(made);
    }
    let mut source = File::open(&path).map_err(fail)?;
    let mut file = import.writer.begin(None, meta);
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

/// Returns true if the kernel reports this label in the place of one that the loaded policy lacks. The checksum of the object
/// cannot be computed then.
fn is_unknown(label: &[u8]) -> bool {
    label.split(|byte| matches!(byte, b':' | 0)).nth(2) == Some(b"unlabeled_t")
}

/// Returns true if the file or symlink at `path` is the object `id`.
fn has_checksum(path: &Path, meta: &FileMeta, id: &ObjectId) -> io::Result<bool> {
    let mut hasher = meta.hasher();
    if meta.target.is_none() {
        let (mut file, mut piece) = (File::open(path)?, vec![0; 256 * 1024]);
        loop {
            match file.read(&mut piece)? {
                0 => break,
                count => hasher.update(&piece[..count]),
            }
        }
    }
    Ok(ObjectId(hasher.finalize().into()) == *id)
}

/// Returns the failure of an object of the booted repo that differs from its name. A copy of it would have a valid name.
fn damaged(import: &Import, id: &ObjectId, at: &str) -> Failure {
    const ADVICE: &str = "run ostree fsck, and replace the booted system";
    let message = format!("cannot relabel {at}: the object {id}.file in the booted repo has another checksum");
    Failure { advice: ADVICE, ..import.local(message) }
}

fn lookup(labels: &Labels, image: &PullSpec, path: &str, mode: u32) -> Result<Option<Vec<u8>>, Failure> {
    labels.of(path, mode).map_err(|what| Failure::new(Kind::BadFormat, format!("the image {image}: {what}")))
}

/// Mode and label of an object; `None` if neither repo has it.
type ModeAndLabel = Option<(u32, Option<Vec<u8>>)>;

/// Reads the mode and label of a stored object. Returns `None` if neither repo has it.
fn read_label(import: &Import, id: &ObjectId) -> Result<ModeAndLabel, Failure> {
    let Some(path) = import.content_path(id) else { return Ok(None) };
    let fail = |error| import.local(format!("cannot read the object {id}.file: {error}"));
    let Some(meta) = if_found(path.symlink_metadata()).map_err(fail)? else { return Ok(None) };
    let label = match import.replacement(id) {
        Some(replacement) => replacement.label.as_deref().map(<[u8]>::to_vec),
        None => xattr::get(&path, xattr::LABEL).map_err(|errno| fail(errno.into()))?,
    };
    Ok(Some((meta.mode(), label)))
}
