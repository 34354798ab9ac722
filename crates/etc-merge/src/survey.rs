//! Reads the three trees and makes the plan.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::defaults::Defaults;
use super::name::Bytes;
use super::plan::Plan;
use super::scan::TEMPORARY;
use super::snapshot::{Entry, Obstacle};

/// Scans the three trees, each on a thread of its own, and decides. What earlier merges took from node images counts as
/// a default, by the list `earlier`.
///
/// # Errors
/// When a tree cannot be read.
pub fn plan(base: BorrowedFd<'_>, new: BorrowedFd<'_>, current: BorrowedFd<'_>, earlier: &Defaults) -> Result<Plan> {
    let [base, new, etc] = std::thread::scope(|scope| {
        let scans = [(base, "the booted /usr/etc"), (new, "the node image's /usr/etc"), (current, "/etc")]
            .map(|(dir, name)| scope.spawn(move || super::scan(dir).with_context(|| format!("reading {name}"))));
        scans.map(|scan| scan.join().unwrap_or_else(|_| Err(anyhow!("a scan panicked"))))
    });
    let (mut base, mut new, etc) = (base?, new?, etc?);
    Attributes::of(current).mark(&mut new.root);
    earlier.rebase(&mut base, &etc);
    Ok(Plan { earlier: earlier.clone(), ..super::decide(&base, &new, &etc) })
}

/// The extended attributes that the file system of `/etc` can hold: those of defaults are tried on a nameless file.
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
        // Where no file can be made, no merge is possible, which the switch finds out before it changes anything.
        let Ok(file) = file else { return true };
        let set = rustix::fs::fsetxattr(&file, &name.0, &value.0, XattrFlags::empty());
        // Each by itself: together they need more space.
        let _ = rustix::fs::fremovexattr(&file, &name.0);
        // The default access control list of a directory is refused to a file where it is known at all.
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
        // A file system without nameless files, such as an overlay of older kernels.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {}
        other => return other,
    }
    let file = rustix::fs::openat(etc, TEMPORARY, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    rustix::fs::unlinkat(etc.as_fd(), TEMPORARY, AtFlags::empty())?;
    Ok(file)
}
