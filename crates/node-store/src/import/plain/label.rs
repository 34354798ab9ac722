//! Looks up SELinux labels in the image's own policy, in the same way as libostree.
//!
//! libostree needs the policy as files: symlinks to objects in a directory of the node store, which is removed at the end
//! of the import. libselinux has one policy root for each process, so any other code that looks up labels must set its own
//! root first.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};

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
    /// Opened on first use.
    labels: OnceLock<Result<Labels, String>>,
}

/// An open policy.
///
/// One thread looks up the labels of all layers in libselinux, which needs 20 KiB for each expression that it has tried:
/// up to 70 MiB for each time that the policy is open. Opening it takes as long as reading a small layer.
#[derive(Debug, Clone)]
pub(super) struct Labels {
    requests: mpsc::Sender<Request>,
    /// Parsed file contexts of the policy; `None` if only libselinux can read them.
    contexts: Option<Arc<Contexts>>,
    /// False if the policy's configuration disables it.
    is_active: bool,
}

/// A path and a mode for libselinux, and the channel of the answer.
#[derive(Debug)]
struct Request(String, u32, mpsc::SyncSender<Result<Option<String>, String>>);

/// Returns the directory of all policies that are files now.
fn shown(store: &NodeStore) -> PathBuf {
    store.root().join("policies")
}

/// Removes the policies that a killed import left. The caller holds the import lock.
pub(in crate::import) fn remove_left_policies(store: &NodeStore) -> io::Result<()> {
    support::ignore_missing(std::fs::remove_dir_all(shown(store)))
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
        let files = PolicyFiles { root, objects: self.clone(), labels: OnceLock::new() };
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
    /// Opens the policy, once.
    pub(super) fn open(&self) -> Result<Labels, String> {
        self.labels.get_or_init(|| self.start()).clone()
    }

    /// Starts the thread that has the policy open. It ends when the last user of the labels has ended.
    fn start(&self) -> Result<Labels, String> {
        let cannot =
            |error: &dyn std::fmt::Display| format!("cannot use its SELinux policy (/usr/etc/selinux): {error}");
        let ((requests, received), (opened, kind)) = (mpsc::channel::<Request>(), mpsc::sync_channel(1));
        let root = self.root.clone();
        let serve = move || {
            let policy = match selinux_labels::open_policy(&root) {
                Ok(policy) => policy,
                Err(error) => return drop(opened.send(Err(error.to_string()))),
            };
            let _ = opened.send(Ok(policy.name().map(String::from)));
            for Request(path, mode, answer) in received {
                let label = policy.label(&path, mode, gio::Cancellable::NONE);
                let _ = answer.send(label.map(|label| label.map(String::from)).map_err(|error| error.to_string()));
            }
        };
        let name = format!("labels {}", self.root.file_name().unwrap_or_default().display());
        std::thread::Builder::new().name(name).spawn(serve).map_err(|error| cannot(&error))?;
        let kind = kind.recv().map_err(|error| cannot(&error))?.map_err(|error| cannot(&error))?;
        let contexts = kind.as_deref().and_then(|kind| self.read_contexts(kind));
        Ok(Labels { requests, contexts, is_active: kind.is_some() })
    }

    /// Returns false if the policy's configuration disables it, so that it labels nothing. A policy that cannot be opened is
    /// active, so that its first use reports the error.
    pub(super) fn is_active(&self) -> bool {
        self.open().map_or(true, |labels| labels.is_active)
    }

    /// Parses the file contexts. Returns `None` if they cannot be read or parsed: libselinux then reads them itself and
    /// reports errors.
    fn read_contexts(&self, kind: &str) -> Option<Arc<Contexts>> {
        let at = self.root.join("usr/etc/selinux").join(kind).join("contexts/files/file_contexts");
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
        let label =
            self.ask(path, mode).map_err(|error| format!("cannot look up the SELinux label of {path}: {error}"))?;
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

    /// Returns the answer of libselinux.
    fn ask(&self, path: &str, mode: u32) -> Result<Option<String>, String> {
        let (answer, label) = mpsc::sync_channel(1);
        self.requests.send(Request(path.to_owned(), mode, answer)).map_err(|error| error.to_string())?;
        label.recv().map_err(|error| error.to_string())?
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

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

    #[test]
    fn one_thread_looks_up_the_labels_of_all_layers() {
        let temp = tempfile::tempdir().unwrap();
        // Policies of other tests have numbers.
        let root = temp.path().join("shared");
        let selinux = root.join("usr/etc/selinux");
        let put = |name: &str, text: &str| {
            let path = selinux.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("config", "SELINUX=enforcing\nSELINUXTYPE=test\n");
        put("test/policy/policy.31", "");
        put("test/contexts/files/file_contexts", "/(.*)?  system_u:object_r:usr_t:s0\n");
        let files = PolicyFiles { root, objects: PolicyObjects::default(), labels: OnceLock::new() };
        let threads = || {
            let names = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let names = names.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
            names.filter(|name| name == "labels shared\n").count()
        };
        std::thread::scope(|scope| {
            for layer in 0..8 {
                let files = &files;
                scope.spawn(move || {
                    let labels = files.open().unwrap();
                    let label = labels.of(&format!("/usr/{layer}"), 0o100_644).unwrap();
                    assert_eq!(label.as_deref(), Some(b"system_u:object_r:usr_t:s0\0".as_slice()));
                });
            }
        });
        assert!(files.is_active());
        assert_eq!(threads(), 1);
        drop(files);
        let limit = Instant::now() + Duration::from_secs(60);
        while threads() > 0 {
            assert!(Instant::now() < limit, "the thread does not end");
            std::thread::yield_now();
        }
    }
}
