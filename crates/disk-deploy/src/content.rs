//! The commits, refs and objects of an image that a disk needs.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;

use node_store::image::ResolvedImage;
use node_store::store::{NodeStore, ObjectId, ObjectType, image_ref, layer_ref};
use ostree::glib::variant::ToVariant;
use ostree::prelude::{FileExt, FileExtManual};
use ostree::{gio, glib};
use support::xattr;

use super::error::{DeployError, failed};
use super::reference::OstreeReference;
use super::seal::{self, Sealer};
use super::space::{self, Missing};

/// An image in the node store.
pub(crate) struct Content<'a> {
    store: &'a NodeStore,
    /// The store's repo as libostree opens it, with the booted repo as parent.
    pub repo: ostree::Repo,
    /// Commit of the image, with its manifest and config.
    pub commit: ObjectId,
    /// Refs of the image and of its layers, with their commits.
    refs: BTreeMap<String, ObjectId>,
}

impl<'a> Content<'a> {
    /// Finds the image by its digest. The store has a ref for it only if it is complete.
    pub fn of(store: &'a NodeStore, image: &ResolvedImage) -> Result<Self, DeployError> {
        let incomplete = || DeployError::Incomplete(image.pinned.to_string());
        let fail =
            |cause: std::io::Error| DeployError::Failed { step: "read the node store", cause: cause.to_string() };
        let name = image_ref(&image.pinned.reference());
        let commit = store.resolve(&name).map_err(fail)?.filter(|commit| !store.is_partial(commit));
        let commit = commit.ok_or_else(incomplete)?;
        let repo = ostree::Repo::new_for_path(store.repo_path());
        repo.open(gio::Cancellable::NONE).map_err(failed("open the node store"))?;
        let (variant, _) = repo.load_commit(&commit.to_string()).map_err(failed("read the image's commit"))?;
        let metadata = glib::VariantDict::new(Some(&variant.child_value(0)));
        let manifest = metadata.lookup::<String>("ostree.manifest").ok().flatten().ok_or_else(incomplete)?;
        let mut refs = BTreeMap::from([(name, commit)]);
        for layer in layers(&manifest).ok_or_else(incomplete)? {
            let name = layer_ref(&layer);
            // A layer without a ref is fetched again by an update that has it, too.
            if let Some(commit) = store.resolve(&name).map_err(fail)? {
                refs.insert(name, commit);
            }
        }
        Ok(Self { store, repo, commit, refs })
    }

    /// Returns true if the root of a deployed image reads only files with fs-verity.
    pub fn must_seal(&self, cancel: &gio::Cancellable) -> Result<bool, DeployError> {
        let fail = || failed("read the image's prepare-root.conf");
        let (root, _) = self.repo.read_commit(&self.commit.to_string(), Some(cancel)).map_err(fail())?;
        // For libostree, the file in /etc replaces the other.
        for dir in ["usr/etc", "usr/lib"] {
            let file = root.resolve_relative_path(format!("{dir}/ostree/prepare-root.conf"));
            match file.load_contents(Some(cancel)) {
                Ok((config, _)) => return Ok(seal::is_demanded(&String::from_utf8_lossy(&config))),
                Err(error) if error.matches(gio::IOErrorEnum::NotFound) => {}
                Err(error) => return Err(fail()(error)),
            }
        }
        Ok(false)
    }

    /// Lists the objects, and counts those that `target` lacks.
    ///
    /// # Errors
    /// If an object of the image is neither in the node store nor in the booted repo.
    pub fn missing_in(
        &self,
        target: &ostree::Repo,
        sealer: Sealer,
        cancel: &gio::Cancellable,
    ) -> Result<Missing, DeployError> {
        let mut objects = HashSet::new();
        for commit in self.refs.values() {
            let reachable = self.repo.traverse_commit(&commit.to_string(), 0, Some(cancel));
            objects.extend(reachable.map_err(failed("list the image's objects"))?);
        }
        let mut missing = Missing { block: space::block(target)?, ..Missing::default() };
        for object in &objects {
            let kind = object.object_type();
            missing.directories += u64::from(kind == ostree::ObjectType::DirTree);
            let has = target.has_object(kind, object.checksum(), Some(cancel));
            let path = seal::path(target, object);
            let stat = match has.map_err(failed("look up objects of the disk"))? {
                true => path.symlink_metadata().ok(),
                false => {
                    let stat = self.stat(object)?;
                    missing.count += 1;
                    missing.bytes += missing.block + stat.len();
                    Some(stat)
                }
            };
            missing.seals +=
                stat.filter(Metadata::is_file).map_or(0, |stat| sealer.space(&path, stat.len(), missing.block));
        }
        Ok(Missing { all: objects, ..missing })
    }

    fn stat(&self, object: &ostree::ObjectName) -> Result<Metadata, DeployError> {
        let path = object.checksum().parse().ok().and_then(|id| self.store.find_object(&id, kind_of(object)));
        let found = path.ok_or_else(|| "neither the node store nor the booted repo has it".to_owned());
        let stat = found.and_then(|path| path.symlink_metadata().map_err(|error| error.to_string()));
        stat.map_err(|cause| DeployError::Failed {
            step: "read the image's objects",
            cause: format!("{}: {cause}", object.checksum()),
        })
    }

    /// Writes the objects that `target` lacks, then the refs. libostree checks each object, and makes all of them
    /// durable before the first ref. The commits are complete when all objects are sealed.
    pub fn write(
        &self,
        objects: &Missing,
        target: &ostree::Repo,
        sealer: Sealer,
        imgref: &OstreeReference,
        progress: &dyn Fn(usize),
        cancel: &gio::Cancellable,
    ) -> Result<(), DeployError> {
        let fail = || failed("write the image's objects");
        let commits: BTreeSet<String> = self.refs.values().map(ToString::to_string).collect();
        let transaction = target.auto_transaction(Some(cancel)).map_err(fail())?;
        // A commit may become visible before its objects.
        let new =
            |commit: &&String| matches!(target.has_object(ostree::ObjectType::Commit, commit, Some(cancel)), Ok(false));
        let new: Vec<&String> = commits.iter().filter(new).collect();
        for commit in &new {
            target.mark_commit_partial(commit, true).map_err(fail())?;
        }
        let (mut written, mut percent) = (0, 0);
        progress(percent);
        for object in &objects.all {
            if !target.has_object(object.object_type(), object.checksum(), Some(cancel)).map_err(fail())? {
                self.write_object(object, target, cancel).map_err(fail())?;
                written += 1;
                let now = written * 100 / objects.count.max(written);
                if std::mem::replace(&mut percent, now) != now {
                    progress(now);
                }
            }
        }
        for (name, commit) in &self.refs {
            target.transaction_set_ref(None, name, Some(&commit.to_string()));
        }
        target.transaction_set_ref(None, &imgref.ref_name(), Some(&self.commit.to_string()));
        transaction.commit(Some(cancel)).map_err(fail())?;
        sealer.objects(target, &objects.all, cancel)?;
        commits.iter().try_for_each(|commit| target.mark_commit_partial(commit, false)).map_err(fail())
    }

    fn write_object(
        &self,
        object: &ostree::ObjectName,
        target: &ostree::Repo,
        cancel: &gio::Cancellable,
    ) -> Result<(), glib::Error> {
        let (kind, name, source) = (object.object_type(), object.checksum(), self.source(object));
        if kind == ostree::ObjectType::File
            && let (Some(content), info, xattrs) = source.load_file(name, Some(cancel))?
            && let Some(xattrs) = real_names(&xattrs)
        {
            let (object, length) = ostree::raw_file_to_content_stream(&content, &info, Some(&xattrs), Some(cancel))?;
            return target.write_content(Some(name), &object, length, Some(cancel)).map(drop);
        }
        target.import_object_from_with_trust(&source, kind, name, false, Some(cancel))
    }

    /// Returns the repo that has the object: that of the node store, or the booted repo.
    fn source(&self, object: &ostree::ObjectName) -> ostree::Repo {
        let is_own = object.checksum().parse().is_ok_and(|id| self.store.has(&id, kind_of(object)));
        let parent = self.repo.parent().filter(|_| !is_own);
        parent.unwrap_or_else(|| self.repo.clone())
    }
}

/// Makes the objects visible that a killed call of this boot has written to `target`, and removes those of earlier boots.
/// libostree finds the former in a transaction only, and both use space.
pub(crate) fn finish_staged(target: &ostree::Repo, cancel: &gio::Cancellable) -> Result<(), DeployError> {
    let fail = || failed("keep the objects of a call that was not finished");
    let dir = target.path().path().unwrap_or_default().join("tmp");
    let mut entries = fs::read_dir(dir).into_iter().flatten().flatten();
    if entries.any(|entry| entry.file_name().as_bytes().starts_with(b"staging-")) {
        target.auto_transaction(Some(cancel)).map_err(fail())?.commit(Some(cancel)).map_err(fail())?;
    }
    Ok(())
}

/// Returns the attributes under their names in the image, or `None` if they have them already: a store on a tmpfs has
/// substitutes before Linux 6.6.
fn real_names(xattrs: &glib::Variant) -> Option<glib::Variant> {
    let stored: Vec<(Vec<u8>, Vec<u8>)> = xattrs.get()?;
    let mut named = stored.clone();
    named.iter_mut().for_each(|(name, _)| *name = xattr::real_name(name).to_vec());
    // The checksum covers the attributes in the order of their names.
    named.sort();
    (named != stored).then(|| named.to_variant())
}

fn kind_of(object: &ostree::ObjectName) -> ObjectType {
    match object.object_type() {
        ostree::ObjectType::File => ObjectType::File,
        ostree::ObjectType::DirTree => ObjectType::DirTree,
        ostree::ObjectType::DirMeta => ObjectType::DirMeta,
        _ => ObjectType::Commit,
    }
}

/// Returns the digests of the layers in a manifest.
fn layers(manifest: &str) -> Option<Vec<String>> {
    let manifest: serde_json::Value = serde_json::from_str(manifest).ok()?;
    let layers = manifest.get("layers")?.as_array()?.iter();
    layers.map(|layer| layer.get("digest")?.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Nothing can be sealed on a tmpfs, so a call that must do it ends after the first refs, as a killed one.
    #[test]
    fn commits_are_partial_until_all_objects_are_sealed() {
        let temp = tempfile::tempdir_in("/dev/shm").unwrap();
        let [root, tree] = ["store", "tree"].map(|name| temp.path().join(name));
        for dir in [&root, &tree] {
            fs::create_dir(dir).unwrap();
        }
        fs::write(tree.join("file"), "content").unwrap();
        let pinned = format!("example.test/os@sha256:{}", "ab".repeat(32));
        let image = ResolvedImage {
            requested: pinned.parse().unwrap(),
            pinned: pinned.parse().unwrap(),
            digest: pinned.split_once('@').unwrap().1.parse().unwrap(),
        };
        let store = NodeStore::on_tmpfs(&root, None).unwrap();
        let mut commit = Command::new("ostree");
        commit.arg("commit").arg("--repo").arg(store.repo_path()).arg("--branch");
        commit.arg(image_ref(&image.pinned.reference())).arg("--add-metadata-string=ostree.manifest={\"layers\":[]}");
        assert!(commit.arg(&tree).output().unwrap().status.success());

        let target = ostree::Repo::new_for_path(temp.path().join("disk"));
        target.create(ostree::RepoMode::Bare, gio::Cancellable::NONE).unwrap();
        let (content, imgref) = (Content::of(&store, &image).unwrap(), OstreeReference::of(&image));
        let write = |sealer| {
            let cancel = gio::Cancellable::new();
            let missing = content.missing_in(&target, sealer, &cancel)?;
            content.write(&missing, &target, sealer, &imgref, &|_| {}, &cancel).map(|()| missing.count)
        };
        let is_partial = || {
            let (_, state) = target.load_commit(&content.commit.to_string()).unwrap();
            state.contains(ostree::RepoCommitState::PARTIAL)
        };
        for _ in 0..2 {
            let error = write(Sealer::Must).unwrap_err().to_string();
            assert!(error.contains("enable fs-verity") && is_partial(), "{error}");
        }
        assert_eq!((write(Sealer::Try).unwrap(), is_partial()), (0, false), "the next call writes no object again");
    }
}
