//! Opens policies in libselinux, through libostree.

use std::io;
use std::path::Path;
use std::sync::Mutex;

use ostree::gio;

use crate::contexts::Texts;
use support::lock;

/// Opens the policy of the tree at `root` (in its `etc/selinux` or `usr/etc/selinux`). The object has no policy if the
/// tree has none.
///
/// # Errors
/// libselinux cannot read the policy's files.
pub fn open_policy(root: &Path) -> Result<ostree::SePolicy, ostree::glib::Error> {
    // Opening changes libselinux's policy root, which is global to the process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = lock(&ONE_AT_A_TIME);
    ostree::SePolicy::new(&gio::File::for_path(root), gio::Cancellable::NONE)
}

/// Opens a policy with the file contexts `texts`. During the call, the directory `file-contexts` in `scratch` holds
/// them as files, because libostree reads only files.
///
/// # Errors
/// The files cannot be written or removed, or libselinux cannot read them.
pub fn open_contexts(texts: &Texts, scratch: &Path) -> io::Result<ostree::SePolicy> {
    let root = scratch.join("file-contexts");
    let opened = texts.write(&root.join("usr/etc/selinux")).and_then(|()| open_policy(&root).map_err(io::Error::other));
    let removed = std::fs::remove_dir_all(&root);
    let policy = opened?;
    removed?;
    Ok(policy)
}
