//! One mount namespace, reached from wherever the caller is.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::CloneFlags;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::LinkNameSpaceType;

use super::table::{self, Exposure, Mount};
use support::failpoint::{self, Point};

/// A mount namespace, named by a process that lives in it.
#[derive(Debug, Clone)]
pub struct Namespace {
    proc_dir: PathBuf,
}

impl Namespace {
    /// PID 1's namespace: the one that services are started from.
    pub fn init() -> Self {
        Self::of(1)
    }

    /// The namespace of a process or thread. It must stay alive while this is used.
    pub fn of(pid: i32) -> Self {
        Self { proc_dir: PathBuf::from(format!("/proc/{pid}")) }
    }

    /// The namespace's mount table, as it is now.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        let path = self.proc_dir.join("mountinfo");
        let text = std::fs::read(&path).with_context(|| format!("reading the mount table {}", path.display()))?;
        Ok(table::parse(&text))
    }

    /// Returns how the mount named `source` shows at `target` here.
    pub fn exposure(&self, target: &Path, source: &str) -> Result<Exposure> {
        Ok(table::exposure(&self.mounts()?, target, source))
    }

    /// Runs `act` in this namespace, on a thread of its own, so that the caller stays where it is.
    ///
    /// Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT. Paths in `act` are looked up from the namespace's root;
    /// file descriptors of the caller stay valid.
    ///
    /// # Errors
    /// Those of entering, before `act` ran, and those of `act` itself.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter().with_context(|| {
                    format!("entering the mount namespace of {}: nothing was changed", self.proc_dir.display())
                })?;
                act()
            });
            thread.join().map_err(|_| anyhow!("the thread in the other mount namespace panicked"))?
        })
    }

    /// Runs `act` in a private copy of this namespace that lacks the mount named `source` at `target`: what
    /// is below it shows there, to `act` alone.
    ///
    /// # Errors
    /// Something else is mounted over ours; those of [`Namespace::run`] and of the private copy. Nothing is
    /// changed outside of it.
    pub fn run_without<T: Send>(
        &self,
        target: &Path,
        source: &str,
        act: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let exposure = self.exposure(target, source)?;
        if exposure == Exposure::Covered {
            bail!("{} is covered by another mount than {source}", target.display());
        }
        self.run(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
            // Before anything else: what is unmounted from here on must not spread.
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .context("keeping mounts to ourselves")?;
            if exposure == Exposure::OnTop {
                rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .with_context(|| format!("looking below {source} at {}", target.display()))?;
            }
            act()
        })
    }

    /// Moves the calling thread, which must be a short-lived one, into the namespace.
    fn enter(&self) -> Result<()> {
        let path = self.proc_dir.join("ns/mnt");
        let link = std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // Root and working directory are shared between threads; setns refuses while they are.
        nix::sched::unshare(CloneFlags::CLONE_FS).context("unshare(CLONE_FS)")?;
        rustix::thread::move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Mount)).context("setns")
    }

    /// Takes the mount named `source` away from `target`: what was there before shows again.
    ///
    /// Programs that hold files of the mount keep them (the mount is detached, not forced). Returns
    /// `false`, having done nothing, when there is no such mount.
    ///
    /// # Errors
    /// Refuses, with nothing changed, when something else is mounted over ours; fails with nothing
    /// changed when the kernel refuses.
    pub fn withdraw(&self, target: &Path, source: &str) -> Result<bool> {
        let mounts = self.mounts()?;
        match table::exposure(&mounts, target, source) {
            Exposure::Absent => return Ok(false),
            Exposure::Covered => {
                let over =
                    table::top(&mounts, target).map(|mount| format!("{} ({})", mount.source.display(), mount.fstype));
                bail!(
                    "{} is covered by another mount, {}: left as it is; unmount that one first",
                    target.display(),
                    over.unwrap_or_default()
                );
            }
            Exposure::OnTop => {}
        }
        self.run(|| {
            failpoint::hit(Point::Withdraw, "")
                .and_then(|()| Ok(rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?))
                .with_context(|| format!("unmounting {source} from {}: it is still in place", target.display()))
        })?;
        Ok(true)
    }
}
