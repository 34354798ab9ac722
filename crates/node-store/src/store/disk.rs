//! The disk store's part: objects wait in a directory of ours until they are known to be on the disk, and
//! only then get their names in the system's repo, which others read and write at the same time.
//!
//! That is libostree's own order (`ostree_repo_commit_transaction` in `ostree-repo-commit.c`): write
//! aside, one syncfs(2) for all of them, rename, sync again, ref. One sync of the file system and not one
//! of every object: 25,000 of those take minutes on a real disk, and before the ref is set nobody has
//! any use for one object alone.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// Our directory in the repo. libostree leaves `extensions/` to others and never cleans it.
const OURS: &str = "extensions/node-image-pivot";
const BOOT: &str = "boot-";

/// The system's repo, as it is written. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// The repo through a mount that may be written.
    pub repo: PathBuf,
    /// The same as everybody sees it.
    pub shown: PathBuf,
    /// `boot-ID`, relative to the repo: what the next boot has no use for.
    volatile: PathBuf,
    /// Keeps the mount behind `repo` alive.
    _view: Option<Arc<OwnedFd>>,
}

impl Disk {
    /// Makes our directories, and removes what earlier boots left in them: nobody knows which of it had
    /// reached the disk.
    pub fn open(shown: &Path, view: Option<OwnedFd>) -> io::Result<Self> {
        let repo = match &view {
            Some(view) => PathBuf::from(format!("/proc/self/fd/{}", view.as_raw_fd())),
            None => shown.to_owned(),
        };
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot = format!("{BOOT}{}", boot.trim());
        let ours = repo.join(OURS);
        fs::create_dir_all(&ours)?;
        for entry in fs::read_dir(&ours)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(BOOT.as_bytes()) && entry.file_name() != *boot {
                remove_all(&entry.path())?;
            }
        }
        let disk =
            Self { repo, shown: shown.to_owned(), volatile: Path::new(OURS).join(boot), _view: view.map(Arc::new) };
        fs::create_dir_all(disk.incoming().join("tmp"))?;
        for prefix in 0..=255_u8 {
            fs::create_dir_all(disk.incoming().join("objects").join(hex::encode([prefix])))?;
        }
        Ok(disk)
    }

    /// What survives a reboot.
    pub fn kept(&self) -> PathBuf {
        self.repo.join(OURS)
    }

    /// What does not.
    pub fn volatile(&self) -> PathBuf {
        self.repo.join(&self.volatile)
    }

    /// The same as everybody sees it.
    pub fn volatile_shown(&self) -> PathBuf {
        self.shown.join(&self.volatile)
    }

    /// Where objects wait: laid out like a repo.
    pub fn incoming(&self) -> PathBuf {
        self.volatile().join("incoming")
    }

    /// All that was written so far reaches the disk, or an error says that it may not have (Linux 5.8
    /// and later report failed writes here).
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(self.repo.join("objects"))?)?)
    }

    /// Gives the waiting objects their names in the repo; commits come last, so that another process that sees one
    /// finds what it lists. A content object that another process has stored since then stays. Metadata replace the
    /// file of their name: they wait here only if that is missing or damaged.
    pub fn give_names(&self) -> io::Result<()> {
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
                    let how = if is_content { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
                    give_name(&entry.path(), &to.join(name), how)?;
                }
            }
        }
        commits.iter().try_for_each(|(from, to)| give_name(from, to, RenameFlags::empty()))
    }

    /// Removes the objects that wait. The delta tree, which may be in use, stays.
    pub fn discard(&self) -> io::Result<()> {
        remove_all(&self.incoming())
    }

    /// Removes everything of ours but the lock.
    pub fn forget(&self) -> io::Result<()> {
        remove_all(&self.volatile())?;
        remove_all(&self.kept().join("derived"))
    }
}

fn give_name(from: &Path, to: &Path, how: RenameFlags) -> io::Result<()> {
    loop {
        match rustix::fs::renameat_with(CWD, from, CWD, to, how) {
            Err(Errno::EXIST) => return fs::remove_file(from),
            // libostree makes these as they are needed.
            Err(Errno::NOENT) if to.parent().is_some_and(|dir| !dir.exists()) => {
                fs::create_dir_all(to.parent().unwrap_or(to))?;
            }
            other => return Ok(other?),
        }
    }
}

fn remove_all(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
