//! SELinux labels from the image's own policy, as libostree looks them up.
//!
//! libostree wants a policy as files. They are shown to it as symlinks to objects, in a directory of
//! the node store that is gone when the import ends. libselinux keeps one policy root per process:
//! nothing else here looks labels up, and whoever does must set its own.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use ostree::gio;
use sha2::{Digest, Sha256};

use crate::store::{NodeStore, ObjectId, ObjectType};

use super::merge::Dir;
use crate::import::tree::{Lookup, TreeError};
use selinux_labels::contexts::{Contexts, Found, Texts};

/// Where a commit keeps its policy.
const POLICY: [&str; 3] = ["usr", "etc", "selinux"];

/// Extended attributes: names without NUL, and values.
pub(super) type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// The attribute that a label is.
const SELINUX: &[u8] = b"security.selinux";

/// The files of one policy that label lookups need, by path below the root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PolicyObjects(Vec<(String, ObjectId)>);

/// The same as files; removed when dropped.
#[derive(Debug)]
pub(super) struct PolicyFiles {
    root: PathBuf,
    /// What they show.
    pub objects: PolicyObjects,
    /// Read when they are first needed.
    contexts: OnceLock<Option<Arc<Contexts>>>,
}

/// An open policy. Belongs to one thread.
pub(super) struct Labels {
    policy: ostree::SePolicy,
    /// Its file contexts, where they are understood.
    contexts: Option<Arc<Contexts>>,
}

/// Finds the policy in a tree; `None` when it has none.
pub(super) fn policy_objects(
    root: &mut Dir,
    store: &NodeStore,
    lookup: &mut Lookup<'_>,
) -> Result<Option<PolicyObjects>, TreeError> {
    let Some(config) = followed(root, "etc/selinux/config", store, lookup)? else { return Ok(None) };
    let Some(selinux) = root.directory(&POLICY, lookup)? else { return Ok(None) };
    let (_, kinds) = selinux.open(lookup)?;
    let mut found = vec![("usr/etc/selinux/config".to_owned(), config)];
    for (kind, dir) in kinds.iter_mut() {
        // The module store beside these is large and says nothing about labels.
        for part in ["contexts", "policy"] {
            let Some(dir) = dir.directory(&[part], lookup)? else { continue };
            let mut queue = vec![(format!("usr/etc/selinux/{kind}/{part}"), dir)];
            while let Some((path, dir)) = queue.pop() {
                let (files, dirs) = dir.open(lookup)?;
                found.extend(files.iter().map(|(name, id)| (format!("{path}/{name}"), *id)));
                queue.extend(dirs.iter_mut().map(|(name, dir)| (format!("{path}/{name}"), dir)));
            }
        }
    }
    found.sort();
    Ok(Some(PolicyObjects(found)))
}

/// Finds the file at a path of the running system in the tree, through symlinks. A link whose object has not been
/// stored yet is returned itself.
fn followed(
    root: &mut Dir,
    path: &str,
    store: &NodeStore,
    lookup: &mut Lookup<'_>,
) -> Result<Option<ObjectId>, TreeError> {
    const MOST_LINKS: usize = 40;
    let parts = |path: &str| path.split('/').rev().map(str::to_owned).collect::<Vec<_>>();
    let (mut rest, mut at, mut links) = (parts(path), Vec::new(), 0);
    while let Some(part) = rest.pop() {
        match part.as_str() {
            "" | "." => continue,
            ".." => {
                at.pop();
                continue;
            }
            _ => at.push(part),
        }
        // The system's /etc is /usr/etc in a commit.
        let in_etc = at.first().is_some_and(|top| top == "etc");
        let place: Vec<String> = in_etc.then(|| "usr".to_owned()).into_iter().chain(at.iter().cloned()).collect();
        let Some(id) = root.file(&place, lookup)? else { continue };
        let target = store.find_object(&id, ObjectType::File).and_then(|object| std::fs::read_link(object).ok());
        let Some(target) = target.as_deref().and_then(Path::to_str) else {
            return Ok(rest.is_empty().then_some(id));
        };
        links += 1;
        if links > MOST_LINKS {
            return Ok(None);
        }
        if target.starts_with('/') {
            at.clear();
        } else {
            at.pop();
        }
        rest.extend(parts(target));
    }
    Ok(None)
}

impl PolicyObjects {
    /// What tells one policy from another.
    pub(super) fn identity(&self) -> String {
        let mut hasher = Sha256::new();
        for (path, id) in &self.0 {
            hasher.update(path.as_bytes());
            hasher.update(id.0);
        }
        hex::encode(hasher.finalize())
    }

    /// Shows the policy as files. `None` while some of them are neither here nor in the booted repo.
    pub(super) fn show(&self, store: &NodeStore) -> io::Result<Option<PolicyFiles>> {
        let root = store.root().join(format!("policy-{}", &self.identity()[..16]));
        match std::fs::remove_dir_all(&root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let files = PolicyFiles { root, objects: self.clone(), contexts: OnceLock::new() };
        for (path, id) in &self.0 {
            let at = files.root.join(path);
            if let Some(dir) = at.parent() {
                std::fs::create_dir_all(dir)?;
            }
            // The binary policy: libostree insists on a regular file, but labels are not in it.
            if path.split('/').nth(4) == Some("policy") {
                std::fs::write(&at, b"")?;
                continue;
            }
            let Some(object) = store.find_object(id, ObjectType::File) else { return Ok(None) };
            match std::fs::read_link(&object) {
                Ok(target) => symlink(target, &at)?,
                Err(_) => symlink(std::path::absolute(object)?, &at)?,
            }
        }
        Ok(Some(files))
    }
}

impl Drop for PolicyFiles {
    fn drop(&mut self) {
        // What stays behind is a few symlinks; the next import removes them.
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

impl PolicyFiles {
    /// Opens the policy for one thread.
    pub(super) fn open(&self) -> Result<Labels, String> {
        let policy = selinux_labels::open_policy(&self.root)
            .map_err(|error| format!("its SELinux policy (/usr/etc/selinux) cannot be used: {error}"))?;
        let contexts = self.contexts.get_or_init(|| self.read_contexts(&policy));
        Ok(Labels { contexts: contexts.clone(), policy })
    }

    /// `None` when libselinux should judge alone; what is wrong with a file, it says itself.
    fn read_contexts(&self, policy: &ostree::SePolicy) -> Option<Arc<Contexts>> {
        let kind = policy.name()?;
        let at = self.root.join("usr/etc/selinux").join(kind.as_str()).join("contexts/files/file_contexts");
        let contexts = Contexts::parse(&Texts::read(&at).ok()?);
        if contexts.is_none() {
            tracing::debug!("the image's SELinux file contexts are unusual: each label is looked up by libselinux");
        }
        contexts.map(Arc::new)
    }
}

impl Labels {
    /// The label of a path (absolute) with this mode (file type included), as it stands in the
    /// attribute `security.selinux`: with its final NUL. `None` when the policy has none for it.
    ///
    /// libselinux has the last word: it is asked once for each line of the contexts that decides, and
    /// from then on for everything, should it say otherwise.
    pub(super) fn of(&self, path: &str, mode: u32) -> Result<Option<Vec<u8>>, String> {
        let terminated = |label: &str| label.bytes().chain([0]).collect();
        // libostree looks this one up elsewhere.
        let contexts = self.contexts.as_ref().filter(|_| path != "/proc");
        let found = contexts.and_then(|contexts| contexts.find(path, mode));
        if let Some(found) = found.filter(Found::is_confirmed) {
            return Ok(found.label.map(terminated));
        }
        let label = self.policy.label(path, mode, gio::Cancellable::NONE);
        let label = label.map_err(|error| format!("looking up the SELinux label of {path}: {error}"))?;
        match (found, contexts) {
            (Some(found), _) if found.label == label.as_deref() => found.confirm(),
            (Some(found), Some(contexts)) => {
                let (ours, theirs) = (found.label.unwrap_or("none"), label.as_deref().unwrap_or("none"));
                tracing::debug!(
                    path,
                    ours,
                    theirs,
                    "libselinux reads the file contexts otherwise: it is asked each time"
                );
                contexts.refute();
            }
            _ => {}
        }
        Ok(label.as_deref().map(terminated))
    }
}

/// Puts a label in place of whatever there was, in the order of names.
pub(super) fn set_label(xattrs: &mut Pairs, label: Vec<u8>) {
    xattrs.retain(|(name, _)| name != SELINUX);
    xattrs.push((SELINUX.to_vec(), label));
    xattrs.sort();
}

/// The label among attributes.
pub(super) fn label_of(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<&[u8]> {
    xattrs.iter().find(|(name, _)| name == SELINUX).map(|(_, value)| value.as_slice())
}
