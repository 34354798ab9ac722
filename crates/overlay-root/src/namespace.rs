//! Work in the mount namespace of another process.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::CloneFlags;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;

use super::table::{self, Exposure, Mount};
use support::failpoint::{self, Point};

/// Moves the calling thread to a private copy of its mount namespace: its mounts do not propagate. The thread cannot
/// return.
pub(crate) fn make_private() -> Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).context("cannot create a mount namespace")?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make mounts private")
}

/// Runs `act` on a new thread in a private copy of the caller's mount namespace.
pub(crate) fn privately<T: Send>(act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| make_private().and_then(|()| act()));
        thread.join().map_err(|_| anyhow!("internal error: the thread in a private mount namespace panicked"))?
    })
}

/// The mount namespace of a process.
#[derive(Debug, Clone)]
pub struct Namespace {
    proc_dir: PathBuf,
}

impl Namespace {
    /// Returns PID 1's namespace, in which services are started.
    pub fn init() -> Self {
        Self::of(1)
    }

    /// Returns the namespace of a process or thread, which must stay alive while the value is used.
    pub fn of(pid: i32) -> Self {
        Self { proc_dir: PathBuf::from(format!("/proc/{pid}")) }
    }

    /// Reads the namespace's mount table.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        let path = self.proc_dir.join("mountinfo");
        let text = std::fs::read(&path).with_context(|| format!("cannot read the mount table {}", path.display()))?;
        Ok(table::parse(&text))
    }

    /// Returns the visibility of the mount named `source` at `target` in this namespace.
    pub fn exposure(&self, target: &Path, source: &str) -> Result<Exposure> {
        Ok(table::exposure(&self.mounts()?, target, source))
    }

    /// Runs `act` in this namespace on a new thread, so that the caller's thread stays in its namespace.
    ///
    /// Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT. Paths in `act` start at the namespace's root. The caller's file descriptors
    /// stay valid.
    ///
    /// # Errors
    /// The namespace cannot be entered (`act` did not run), and errors of `act`.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()
                    .with_context(|| format!("cannot enter the mount namespace of {}", self.proc_dir.display()))?;
                act()
            });
            thread.join().map_err(|_| anyhow!("internal error: the thread in the other mount namespace panicked"))?
        })
    }

    /// Runs `act` in a private copy of this namespace without the mount named `source` at `target`. Only `act` sees the
    /// directory below that mount. This namespace does not change.
    ///
    /// # Errors
    /// Another mount covers the mount at `target`, the private copy cannot be made, and errors of [`Namespace::run`].
    pub fn run_without<T: Send>(
        &self,
        target: &Path,
        source: &str,
        act: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let exposure = self.exposure(target, source)?;
        if exposure == Exposure::Covered {
            bail!("cannot look below {source} at {}: another mount covers it", target.display());
        }
        self.run(|| {
            make_private()?;
            if exposure == Exposure::OnTop {
                rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).with_context(|| {
                    format!("cannot unmount {source} from {} in a private namespace", target.display())
                })?;
            }
            act()
        })
    }

    /// Moves the calling thread into the namespace. The thread cannot return to its own namespace.
    fn enter(&self) -> Result<()> {
        let path = self.proc_dir.join("ns/mnt");
        let link = std::fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        // Threads share root and working directory, and setns(2) fails for a thread that shares them.
        nix::sched::unshare(CloneFlags::CLONE_FS).context("unshare(CLONE_FS)")?;
        rustix::thread::move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Mount)).context("setns")
    }

    /// Unmounts the mount named `source` from `target`, so that the directory below is visible again. Returns false if
    /// there is no such mount.
    ///
    /// The mount is detached: programs keep their open files of it.
    ///
    /// # Errors
    /// Another mount covers it, or the kernel refuses. The mount is then still in place.
    pub fn withdraw(&self, target: &Path, source: &str) -> Result<bool> {
        let mounts = self.mounts()?;
        match table::exposure(&mounts, target, source) {
            Exposure::Absent => return Ok(false),
            Exposure::Covered => {
                let over =
                    table::top(&mounts, target).map(|mount| format!("{} ({})", mount.source.display(), mount.fstype));
                bail!(
                    "cannot unmount {source} from {}: another mount covers it; unmount {} first",
                    target.display(),
                    over.unwrap_or_default()
                );
            }
            Exposure::OnTop => {}
        }
        self.run(|| {
            failpoint::hit(Point::Withdraw, "")
                .and_then(|()| Ok(rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?))
                .with_context(|| format!("cannot unmount {source} from {}", target.display()))
        })?;
        Ok(true)
    }
}
