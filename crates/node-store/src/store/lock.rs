//! Locks: the agent's import lock (flock(2)), and libostree's lock of a repo that other programs write to. The kernel
//! releases both when their holder dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FlockOperation, flock};

/// Error of an attempt to take a lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process, or another thread of this process, holds the lock.
    #[error("{path} is locked by {holder}")]
    Held {
        /// Path of the lock file.
        path: String,
        /// Process ids and names of the holders, if they are known.
        holder: String,
    },
    /// An operation on the lock file, or on a file that needs the lock, failed.
    #[error("cannot use {path}")]
    Io {
        /// Path of the file.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A held lock, released when dropped. The file stays: if it were removed, two processes could hold the lock.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
    /// libostree's lock of the system's repo.
    _repo: Option<File>,
}

impl StoreLock {
    /// Takes the import lock. Does not wait.
    ///
    /// # Errors
    /// [`LockError::Held`] names the process that holds it.
    pub fn try_acquire(path: &Path) -> Result<Self, LockError> {
        let fail = |source| failed(path, source);
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(fail)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // The holder only makes the message better, so a read error is ignored.
                let _ = file.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => UNKNOWN.to_owned(),
                    holder => holder.to_owned(),
                };
                return Err(LockError::Held { path: path.display().to_string(), holder });
            }
            Err(errno) => return Err(fail(errno.into())),
        }
        file.set_len(0).map_err(fail)?;
        file.rewind().map_err(fail)?;
        writeln!(file, "{}", process(std::process::id())).map_err(fail)?;
        Ok(Self { _file: file, _repo: None })
    }

    /// Also takes libostree's lock of `repo` in shared mode, as every writer does. Pruning needs the lock exclusively, so
    /// it cannot remove objects that are written under this lock. Does not wait.
    ///
    /// Source: `ostree_repo_lock_push` in libostree's `ostree-repo.c`: an open file description lock
    /// (fcntl(2)) on the whole file `.lock`.
    pub(super) fn with_repo(self, repo: &Path, public_path: &Path) -> Result<Self, LockError> {
        let path = public_path.join(".lock");
        let fail = |source| failed(&path, source);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(repo.join(".lock"))
            .map_err(fail)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_RDLCK))) {
            Ok(_) => Ok(Self { _repo: Some(file), ..self }),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                Err(LockError::Held { path: path.display().to_string(), holder: holders(&file) })
            }
            Err(errno) => Err(fail(errno.into())),
        }
    }
}

/// Returns fcntl(2)'s description of a lock on the whole file, of any size.
fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

const UNKNOWN: &str = "an unknown process";

fn failed(path: &Path, source: io::Error) -> LockError {
    LockError::Io { path: path.display().to_string(), source }
}

/// Returns the processes that hold a lock on the file. `/proc/locks` has no process id for an open file description lock,
/// but the descriptor's `fdinfo` shows it.
fn holders(file: &File) -> String {
    let Ok(wanted) = file.metadata() else { return UNKNOWN.to_owned() };
    let is_holder = |pid: u32| {
        let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
        dir.flatten().find(|entry| {
            let same = std::fs::metadata(entry.path())
                .is_ok_and(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino()));
            let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().display());
            same && std::fs::read_to_string(info).is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
        })
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let holders: Vec<_> = pids.filter(|pid| is_holder(*pid).is_some()).map(process).collect();
    if holders.is_empty() { UNKNOWN.to_owned() } else { holders.join(", ") }
}

fn process(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("pid {pid} ({})", name.trim())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Repeats `attempt` for at most a minute. A child process that another test starts holds the locks of this process
    /// until it calls exec.
    fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
        let attempts = (0..6000).find_map(|_| {
            attempt().or_else(|| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                None
            })
        });
        attempts.expect("the lock is not released")
    }

    #[test]
    fn a_held_lock_names_its_holder_and_is_free_after_release() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let first = StoreLock::try_acquire(&path).unwrap();
        let refused = StoreLock::try_acquire(&path).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(first);
        soon(|| StoreLock::try_acquire(&path).ok());
    }

    #[test]
    fn libostree_prune_and_a_pull_exclude_each_other() {
        use ostree::gio::Cancellable;
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("repo");
        let repo = ostree::Repo::new_for_path(&path);
        repo.create(ostree::RepoMode::Bare, Cancellable::NONE).unwrap();
        let lock = || StoreLock::try_acquire(&temp.path().join("lock")).and_then(|lock| lock.with_repo(&path, &path));
        let prune = || {
            let mut ostree = std::process::Command::new("ostree");
            ostree.args(["prune", "--refs-only"]).arg(format!("--repo={}", path.display())).output().unwrap()
        };
        let config = path.join("config");
        let text = std::fs::read_to_string(&config).unwrap().replace("[core]", "[core]\nlock-timeout-secs=0");
        std::fs::write(&config, text).unwrap();

        // A transaction of libostree takes the lock in shared mode, too.
        repo.prepare_transaction(Cancellable::NONE).unwrap();
        let held = lock().unwrap();
        repo.abort_transaction(Cancellable::NONE).unwrap();
        let refused = prune();
        assert!(
            !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("Locking"),
            "{refused:?}"
        );
        drop(held);
        soon(|| prune().status.success().then_some(()));

        let file = OpenOptions::new().write(true).open(path.join(".lock")).unwrap();
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).unwrap();
        let refused = lock().unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {} (", std::process::id())), "{refused}");
        drop(file);
        soon(|| lock().ok());
    }
}
