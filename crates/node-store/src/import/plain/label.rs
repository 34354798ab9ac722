//! Looks up SELinux labels in the image's own policy, in the same way as libostree.
//!
//! libostree needs the policy as files: symlinks to objects in a directory of the node store, which is removed at the end
//! of the import. libselinux has one policy root for each process, so any other code that looks up labels must set its own
//! root first.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ostree::gio;
use sha2::{Digest, Sha256};

use crate::store::{NodeStore, ObjectId, ObjectType};

use super::merge::Dir;
use crate::import::tree::{Lookup, TreeError};
use selinux_labels::contexts::{Contexts, Found, Texts};

/// Directory of the policy in a commit.
const POLICY: [&str; 3] = ["usr", "etc", "selinux"];

/// Objects of the policy files that label lookups need, by path relative to the root. Sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PolicyObjects(Vec<(String, ObjectId)>);

/// Directory with the files of a policy; removed on drop.
#[derive(Debug)]
pub(super) struct PolicyFiles {
    root: PathBuf,
    /// Objects of the files.
    pub objects: PolicyObjects,
    /// Parsed file contexts; `None` if only libselinux can read them. Read on first use.
    contexts: OnceLock<Option<Arc<Contexts>>>,
}

/// An open policy. Belongs to one thread.
pub(super) struct Labels {
    policy: ostree::SePolicy,
    /// Its parsed file contexts; `None` if only libselinux can read them.
    contexts: Option<Arc<Contexts>>,
}

/// Returns the directory of all policies that are files now.
fn shown(store: &NodeStore) -> PathBuf {
    store.root().join("policies")
}

/// Removes the policies that a killed import left. The caller holds the import lock.
pub(in crate::import) fn remove_left_policies(store: &NodeStore) -> io::Result<()> {
    match std::fs::remove_dir_all(shown(store)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the policy of a tree, or `None` if it has none.
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
        // The module store in the same directory is large and not needed for labels.
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

/// Returns the file that `path` names in a deployment of the tree, after following symlinks. Returns the symlink itself if
/// its object has not been stored yet.
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
        // A commit has the content of /etc in /usr/etc.
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
    /// Returns a checksum that identifies the policy.
    pub(super) fn identity(&self) -> String {
        let mut hasher = Sha256::new();
        for (path, id) in &self.0 {
            hasher.update(path.as_bytes());
            hasher.update(id.0);
        }
        hex::encode(hasher.finalize())
    }

    /// Returns the objects of the files.
    pub(super) fn ids(&self) -> impl Iterator<Item = &ObjectId> {
        self.0.iter().map(|(_, id)| id)
    }

    /// Creates the files of the policy. Returns `None` while objects of some of them are in neither repo.
    pub(super) fn show(&self, store: &NodeStore) -> io::Result<Option<PolicyFiles>> {
        // Two layers may have the same policy, and each value removes its own directory.
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let root = shown(store).join(SERIAL.fetch_add(1, Ordering::Relaxed).to_string());
        let files = PolicyFiles { root, objects: self.clone(), contexts: OnceLock::new() };
        for (path, id) in &self.0 {
            let at = files.root.join(path);
            if let Some(dir) = at.parent() {
                std::fs::create_dir_all(dir)?;
            }
            // The binary policy: libostree requires a regular file, but does not read labels from it.
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
        // The next import removes symlinks that could not be removed here.
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

impl PolicyFiles {
    /// Opens the policy for one thread.
    pub(super) fn open(&self) -> Result<Labels, String> {
        let policy = selinux_labels::open_policy(&self.root)
            .map_err(|error| format!("cannot use its SELinux policy (/usr/etc/selinux): {error}"))?;
        let contexts = self.contexts.get_or_init(|| self.read_contexts(&policy));
        Ok(Labels { contexts: contexts.clone(), policy })
    }

    /// Returns false if the policy's configuration disables it, so that it labels nothing. A policy that cannot be opened is
    /// active, so that its first use reports the error.
    pub(super) fn is_active(&self) -> bool {
        self.open().map_or(true, |labels| labels.policy.name().is_some())
    }

    /// Parses the file contexts. Returns `None` if they cannot be read or parsed: libselinux then reads them itself and
    /// reports errors.
    fn read_contexts(&self, policy: &ostree::SePolicy) -> Option<Arc<Contexts>> {
        let kind = policy.name()?;
        let at = self.root.join("usr/etc/selinux").join(kind.as_str()).join("contexts/files/file_contexts");
        let contexts = Contexts::parse(&Texts::read(&at).ok()?);
        if contexts.is_none() {
            tracing::debug!("unsupported syntax in file_contexts: using libselinux for each lookup");
        }
        contexts.map(Arc::new)
    }
}

impl Labels {
    /// Returns the label of an absolute path, with the final NUL of the attribute `security.selinux`, or `None` if the
    /// policy has none. `mode` includes the file type.
    ///
    /// libselinux has precedence: the first match of each line of the file contexts is compared with its result, and after
    /// a difference all labels come from libselinux.
    pub(super) fn of(&self, path: &str, mode: u32) -> Result<Option<Vec<u8>>, String> {
        let terminated = |label: &str| label.bytes().chain([0]).collect();
        // libostree has its own rule for this path.
        let contexts = self.contexts.as_ref().filter(|_| path != "/proc");
        let found = contexts.and_then(|contexts| contexts.find(path, mode));
        if let Some(found) = found.filter(Found::is_confirmed) {
            return Ok(found.label.map(terminated));
        }
        let label = self.policy.label(path, mode, gio::Cancellable::NONE);
        let label = label.map_err(|error| format!("cannot look up the SELinux label of {path}: {error}"))?;
        match (found, contexts) {
            (Some(found), _) if found.label == label.as_deref() => found.confirm(),
            (Some(found), Some(contexts)) => {
                let (ours, theirs) = (found.label.unwrap_or("none"), label.as_deref().unwrap_or("none"));
                tracing::debug!(path, ours, theirs, "libselinux returned another label: using it for each lookup");
                contexts.refute();
            }
            _ => {}
        }
        Ok(label.as_deref().map(terminated))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_is_shown_twice_stays_until_its_last_user_ends() {
        let temp = tempfile::tempdir().unwrap();
        let store = NodeStore::on_tmpfs(temp.path(), None).unwrap();
        let objects = PolicyObjects(vec![("usr/etc/selinux/test/policy/policy.31".to_owned(), ObjectId([1; 32]))]);
        let (first, second) = (objects.show(&store).unwrap().unwrap(), objects.show(&store).unwrap().unwrap());
        let file = |shown: &PolicyFiles| shown.root.join(&objects.0[0].0).exists();
        assert!(file(&first) && file(&second));
        drop(second);
        assert!(file(&first));
        drop(first);
        assert_eq!(std::fs::read_dir(shown(&store)).unwrap().count(), 0);
    }
}
