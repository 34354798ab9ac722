//! Private mount namespaces, for tests that mount. They need root.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use nix::sched::CloneFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};

/// Runs `test` on a thread with a private mount namespace and passes it the path of an empty tmpfs. The kernel removes
/// all mounts of `test` with the namespace. Panics of `test` reach the caller.
pub fn private(test: impl FnOnce(&Path) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let scratch = tempfile::tempdir().unwrap();
            rustix::mount::mount("scratch", scratch.path(), "tmpfs", MountFlags::empty(), None).unwrap();
            test(scratch.path());
            rustix::mount::unmount(scratch.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}
