//! The order of writes in a disk store. Objects are pending in the agent's directory until they are known to be on the
//! disk. Only then they are renamed into the system's repo, which other processes read and write at the same time.
//!
//! This is libostree's order (`ostree_repo_commit_transaction` in `ostree-repo-commit.c`): write to another directory,
//! one syncfs(2) for all objects, rename, syncfs(2), write the ref. 25,000 fsync(2) calls would take minutes on a real
//! disk, and no process uses a single object before the ref is set.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use support::{if_found, ignore_missing};

/// The agent's directory in the repo. libostree reserves `extensions/` for other programs and never cleans it.
const AGENT_DIR: &str = "extensions/node-image-pivot";
const BOOT: &str = "boot-";

/// The system's repo, open for writing. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// Path of the repo on a writable mount.
    pub repo: PathBuf,
    /// Path of the repo for all other processes.
    pub public_path: PathBuf,
    /// Directory `boot-ID`, relative to the repo. The next boot removes it.
    volatile: PathBuf,
    /// Keeps the mount behind `repo` alive.
    _view: Option<Arc<OwnedFd>>,
}

impl Disk {
    /// Creates the agent's directories in the repo, and removes those of earlier boots: which of their objects had
    /// reached the disk is not known.
    pub fn open(public_path: &Path, view: Option<OwnedFd>) -> io::Result<Self> {
        let repo = match &view {
            Some(view) => PathBuf::from(format!("/proc/self/fd/{}", view.as_raw_fd())),
            None => public_path.to_owned(),
        };
        fs::create_dir_all(repo.join(AGENT_DIR))?;
        remove_earlier_boots(&repo)?;
        let volatile = Path::new(AGENT_DIR).join(this_boot()?);
        let disk = Self { repo, public_path: public_path.to_owned(), volatile, _view: view.map(Arc::new) };
        fs::create_dir_all(disk.incoming().join("tmp"))?;
        for prefix in 0..=255_u8 {
            fs::create_dir_all(disk.incoming().join("objects").join(hex::encode([prefix])))?;
        }
        Ok(disk)
    }

    /// Returns the directory that stays after a reboot.
    pub fn kept(&self) -> PathBuf {
        self.repo.join(AGENT_DIR)
    }

    /// Returns the directory that the next boot removes.
    pub fn volatile(&self) -> PathBuf {
        self.repo.join(&self.volatile)
    }

    /// Returns the path of [`Disk::volatile`] for all other processes.
    pub fn volatile_public_path(&self) -> PathBuf {
        self.public_path.join(&self.volatile)
    }

    /// Returns the directory of pending objects. Its layout is that of a repo.
    pub fn incoming(&self) -> PathBuf {
        self.volatile().join("incoming")
    }

    /// Writes all data of the file system to the disk. Since Linux 5.8, an error reports earlier failed writes, too.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(self.repo.join("objects"))?)?)
    }

    /// Renames the pending objects to their names in the repo. Commits are last, so that another process that finds one
    /// also finds its objects. A content object that another process has stored meanwhile stays. Metadata replace an
    /// existing file: they are pending only if that file is missing or damaged.
    pub fn publish_objects(&self) -> io::Result<()> {
        let mut commits = Vec::new();
        for prefix in 0..=255_u8 {
            let dir = Path::new("objects").join(hex::encode([prefix]));
            let to = self.repo.join(&dir);
            for entry in fs::read_dir(self.incoming().join(&dir))? {
                let entry = entry?;
                let name = entry.file_name();
                if name.as_encoded_bytes().ends_with(b".commit") {
                    commits.push((entry.path(), to.join(name)));
                } else {
                    let is_content = name.as_encoded_bytes().ends_with(b".file");
                    let flags = if is_content { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
                    rename_object(&entry.path(), &to.join(name), flags)?;
                }
            }
        }
        commits.iter().try_for_each(|(from, to)| rename_object(from, to, RenameFlags::empty()))
    }

    /// Removes the pending objects. The delta tree stays, because it may be in use.
    pub fn discard(&self) -> io::Result<()> {
        ignore_missing(fs::remove_dir_all(self.incoming()))
    }
}

/// Returns the directories of earlier boots in the agent's directory of `repo`. Their hard links keep the space of objects
/// that ostree removes.
pub fn earlier_boots(repo: &Path) -> io::Result<Vec<PathBuf>> {
    let this = this_boot()?;
    let Some(entries) = if_found(fs::read_dir(repo.join(AGENT_DIR)))? else { return Ok(Vec::new()) };
    let is_earlier = |name: &OsStr| name.as_encoded_bytes().starts_with(BOOT.as_bytes()) && *name != *this;
    let paths = entries.map(|entry| Ok(entry?.path()));
    paths.filter(|path| path.as_ref().map_or(true, |path: &PathBuf| path.file_name().is_some_and(is_earlier))).collect()
}

/// Removes the directories of earlier boots from `repo`, which must be on a writable mount.
pub fn remove_earlier_boots(repo: &Path) -> io::Result<()> {
    earlier_boots(repo)?.into_iter().try_for_each(|path| ignore_missing(fs::remove_dir_all(path)))
}

/// Returns the name of this boot's directory.
fn this_boot() -> io::Result<String> {
    Ok(format!("{BOOT}{}", fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim()))
}

fn rename_object(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    loop {
        match rustix::fs::renameat_with(CWD, from, CWD, to, flags) {
            Err(Errno::EXIST) => return fs::remove_file(from),
            // libostree creates the 256 directories only when it needs them.
            Err(Errno::NOENT) if to.parent().is_some_and(|dir| !dir.exists()) => {
                fs::create_dir_all(to.parent().unwrap_or(to))?;
            }
            other => return Ok(other?),
        }
    }
}
