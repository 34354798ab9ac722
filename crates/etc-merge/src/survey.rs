//! Reads the three trees and creates the plan.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::decide::decide;
use super::defaults::Defaults;
use super::name::Bytes;
use super::plan::Plan;
use super::scan::{STAGING, scan};
use super::snapshot::{Entry, Obstacle};

/// Creates the plan for a merge of the three trees. Scans them in parallel. Defaults that earlier merges took
/// (`earlier`) count as defaults of `base` if their content is unchanged.
///
/// Changes nothing, except that it creates an unnamed file on the file system of `current`, to find out which extended
/// attributes that file system supports.
///
/// # Errors
/// A tree cannot be read.
pub fn plan(base: BorrowedFd<'_>, new: BorrowedFd<'_>, current: BorrowedFd<'_>, earlier: &Defaults) -> Result<Plan> {
    let [base, new, etc] = std::thread::scope(|scope| {
        let scans = [(base, "the booted /usr/etc"), (new, "the node image's /usr/etc"), (current, "/etc")]
            .map(|(dir, name)| scope.spawn(move || scan(dir).with_context(|| format!("cannot read {name}"))));
        scans.map(|scan| scan.join().unwrap_or_else(|_| Err(anyhow!("bug: the scan of a tree panicked"))))
    });
    let (mut base, mut new, etc) = (base?, new?, etc?);
    Attributes::of(current).mark(&mut new.root);
    earlier.rebase(&mut base, &etc);
    Ok(Plan { earlier: earlier.clone(), ..decide(&base, &new, &etc) })
}

/// Tests on an unnamed file which extended attributes of defaults the file system of `/etc` can hold.
struct Attributes<'a> {
    etc: BorrowedFd<'a>,
    file: Option<OwnedFd>,
    tried: BTreeMap<(Bytes, Bytes), bool>,
}

impl<'a> Attributes<'a> {
    fn of(etc: BorrowedFd<'a>) -> Self {
        Self { etc, file: None, tried: BTreeMap::new() }
    }

    fn mark(&mut self, entry: &mut Entry) {
        for (name, value) in &entry.leaf.meta.xattrs {
            if !self.can_hold(name, value) {
                entry.obstacle = Some(Obstacle::Attribute);
            }
        }
        entry.children.values_mut().for_each(|child| self.mark(child));
    }

    fn can_hold(&mut self, name: &Bytes, value: &Bytes) -> bool {
        if let Some(known) = self.tried.get(&(name.clone(), value.clone())) {
            return *known;
        }
        let file = match self.file.take() {
            Some(file) => Ok(file),
            None => scratch_file(self.etc),
        };
        // Without a file, a merge is not possible either, and fails before its first change.
        let Ok(file) = file else { return true };
        let set = rustix::fs::fsetxattr(&file, &name.0, &value.0, XattrFlags::empty());
        // Removed at once, because several attributes together could exceed the space for one file.
        let _ = rustix::fs::fremovexattr(&file, &name.0);
        // File systems with access control lists refuse a default list for a file with EACCES.
        let holds = set.is_ok() || (set == Err(Errno::ACCESS) && name.0 == b"system.posix_acl_default");
        self.file = Some(file);
        self.tried.insert((name.clone(), value.clone()), holds);
        holds
    }
}

fn scratch_file(etc: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(etc, ".", flags | OFlags::TMPFILE, mode) {
        // The file system does not support unnamed files, such as overlayfs of older kernels.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {}
        other => return other,
    }
    let file = rustix::fs::openat(etc, STAGING, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    rustix::fs::unlinkat(etc.as_fd(), STAGING, AtFlags::empty())?;
    Ok(file)
}
