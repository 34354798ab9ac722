//! The package of each content object of a commit, from the dpkg database in that commit.
//!
//! This is the role that the rpm database plays for real node images: chunks then follow packages, so an update of one
//! package changes one layer.

use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result};
use ostree_ext::chunking::ObjectMetaSized;
use ostree_ext::objectsource::{ContentID, ObjectMeta, ObjectSourceMeta};
use ostree_ext::ostree;
use ostree_ext::prelude::*;
use ostree_ext::{gio, glib};

/// Directory of dpkg's database after the tree conversion.
const DPKG_INFO: &str = "usr/lib/sysimage/dpkg/info";
/// Objects that no package claims: alternatives, caches, generated configuration.
const UNPACKAGED: &str = "unpackaged";
/// The initramfs is generated, big, and changes with every build: a separate component, as in rpm-ostree.
const INITRAMFS: &str = "initramfs";

/// Map every content object of `commit` to a component and weigh the components.
pub fn of_commit(repo: &ostree::Repo, commit: &str) -> Result<ObjectMetaSized> {
    let (root, _) = repo.read_commit(commit, gio::Cancellable::NONE)?;
    let owners = owners(&root).context("reading the dpkg database of the commit")?;
    let mut meta = ObjectMeta::default();
    walk(&root, "", &owners, &mut meta)?;
    for id in meta.map.values() {
        if !meta.set.contains(&**id) {
            meta.set.insert(ObjectSourceMeta {
                identifier: Rc::clone(id),
                name: Rc::clone(id),
                srcid: Rc::clone(id),
                change_time_offset: 0,
                change_frequency: 0,
            });
        }
    }
    ObjectMetaSized::compute_sizes(repo, meta)
}

/// Path in the commit → package name.
fn owners(root: &gio::File) -> Result<HashMap<String, ContentID>> {
    let mut owners = HashMap::new();
    let info = root.resolve_relative_path(DPKG_INFO);
    for file in children(&info)? {
        let name = file.name();
        let Some(package) = name.to_str().and_then(|n| n.strip_suffix(".list")) else { continue };
        // "libc6:amd64.list": the architecture is not part of the component's name.
        let id: ContentID = Rc::from(package.split(':').next().unwrap_or(package));
        let (text, _) = info.child(&name).load_contents(gio::Cancellable::NONE)?;
        for path in std::str::from_utf8(&text)?.lines() {
            owners.insert(in_commit(path), Rc::clone(&id));
        }
    }
    Ok(owners)
}

/// A path as dpkg spells it, as it is in the commit: merged /usr, and /etc as usr/etc.
fn in_commit(path: &str) -> String {
    let path = path.trim_start_matches('/');
    match path.split('/').next() {
        Some("bin" | "sbin" | "lib" | "lib32" | "lib64" | "libx32" | "etc") => format!("usr/{path}"),
        _ => path.to_string(),
    }
}

fn children(dir: &gio::File) -> Result<Vec<gio::FileInfo>> {
    dir.enumerate_children(
        "standard::name,standard::type",
        gio::FileQueryInfoFlags::NOFOLLOW_SYMLINKS,
        gio::Cancellable::NONE,
    )?
    .map(|info| info.map_err(|e: glib::Error| e.into()))
    .collect()
}

fn walk(dir: &gio::File, prefix: &str, owners: &HashMap<String, ContentID>, meta: &mut ObjectMeta) -> Result<()> {
    for info in children(dir)? {
        let name = info.name();
        let child = dir.child(&name);
        let path = format!("{prefix}{}", name.to_str().context("a file name that is not UTF-8")?);
        if info.file_type() == gio::FileType::Directory {
            walk(&child, &format!("{path}/"), owners, meta)?;
            continue;
        }
        let object = child.downcast_ref::<ostree::RepoFile>().context("not a file of a commit")?.checksum();
        let owner = if path.ends_with("/initramfs.img") {
            Rc::from(INITRAMFS)
        } else {
            owners.get(&path).cloned().unwrap_or_else(|| Rc::from(UNPACKAGED))
        };
        // One object at several paths belongs to the first package found: any answer is right, one is needed.
        meta.map.entry(object.to_string()).or_insert(owner);
    }
    Ok(())
}
