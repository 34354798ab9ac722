//! The policy of a tree, through libostree.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ostree::gio;

use crate::contexts::Texts;

/// Opens the policy below a root.
pub fn open_policy(root: &Path) -> Result<ostree::SePolicy, ostree::glib::Error> {
    // Opening sets libselinux's policy root for the whole process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    ostree::SePolicy::new(&gio::File::for_path(root), gio::Cancellable::NONE)
}

/// Opens a policy that has these file contexts. Below `scratch`, it is shown to libostree as files for that long.
pub fn open_contexts(texts: &Texts, scratch: &Path) -> io::Result<ostree::SePolicy> {
    let root = scratch.join("file-contexts");
    let shown = texts.write(&root.join("usr/etc/selinux")).and_then(|()| open_policy(&root).map_err(io::Error::other));
    let removed = std::fs::remove_dir_all(&root);
    let policy = shown?;
    removed?;
    Ok(policy)
}
