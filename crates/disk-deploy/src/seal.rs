//! fs-verity of the objects of an image and of its composefs image. libostree enables it only on objects that it writes, and
//! releases before 2023.4 do not know the key in the configuration.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use composefs_ioctls::fsverity::{EnableVerityError, fs_ioc_enable_verity};
use node_store::store::{Sealing, has_sealed_object, is_sealed, sealing};
use ostree::gio;
use ostree::glib::{KeyFile, KeyFileFlags};
use ostree::prelude::{CancellableExtManual, FileExt};
use rustix::fs::{Mode, OFlags, open};
use tracing::{debug, info};

use super::error::{DeployError, failed};

/// SHA-256 and the block size, as libostree sets them. A composefs image names digests of this kind.
const SHA256: u8 = 1;
const BLOCK: u32 = 4096;

/// Milliseconds between the attempts to seal a file that is open for writing.
const PAUSES: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Enables fs-verity on files, or leaves them unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sealer {
    Off,
    /// Leaves a file unchanged if the file system does not support fs-verity for it.
    Try,
    Must,
}

impl Sealer {
    /// Returns the sealer that the repo of `sysroot` asks for. Tries it on a file without a name.
    ///
    /// # Errors
    /// [`DeployError::Sealed`] if the repo, or the caller by `must_seal`, demands it, and it is not possible there.
    pub fn of(sysroot: &Path, must_seal: bool) -> Result<Self, DeployError> {
        let repo = sysroot.join("ostree/repo");
        let config = fs::read_to_string(repo.join("config")).map_err(|error| DeployError::Failed {
            step: "read the configuration of the repo",
            cause: error.to_string(),
        })?;
        let demand = match must_seal {
            true => Sealing::Must,
            false => sealing(&config, || false),
        };
        if demand == Sealing::No {
            return Ok(Self::Off);
        }
        match try_in(&repo.join("tmp")) {
            Ok(()) if demand == Sealing::Must => Ok(Self::Must),
            Ok(()) => Ok(Self::Try),
            Err(error) if demand == Sealing::Must || has_sealed_object(&repo) => {
                Err(DeployError::Sealed { path: sysroot.to_owned(), cause: error.to_string() })
            }
            Err(error) => {
                info!("{} gets no fs-verity: {error}", repo.display());
                Ok(Self::Off)
            }
        }
    }

    /// Seals those of `objects` that are regular files.
    pub fn objects(
        self,
        repo: &ostree::Repo,
        objects: &HashSet<ostree::ObjectName>,
        cancel: &gio::Cancellable,
    ) -> Result<(), DeployError> {
        for object in objects {
            cancel.set_error_if_cancelled().map_err(failed("enable fs-verity"))?;
            self.file(&path(repo, object))?;
        }
        Ok(())
    }

    /// Seals a file that is not open for writing anywhere. A sealed file, a symlink and a missing file stay unchanged.
    pub fn file(self, path: &Path) -> Result<(), DeployError> {
        let is_file = || path.symlink_metadata().is_ok_and(|stat| stat.is_file());
        if self == Self::Off || !is_file() {
            return Ok(());
        }
        let file = File::open(path).map_err(EnableVerityError::from);
        match file.and_then(|file| enable(&file)) {
            Ok(()) => Ok(()),
            Err(error) if self.accepts(&error) => {
                debug!("{}: {error}", path.display());
                Ok(())
            }
            Err(error) => {
                Err(DeployError::Failed { step: "enable fs-verity", cause: format!("{}: {error}", path.display()) })
            }
        }
    }

    /// Returns true if a deployment continues after this failure.
    fn accepts(self, error: &EnableVerityError) -> bool {
        match error {
            EnableVerityError::AlreadyEnabled => true,
            // On ext4, this may be a property of the file, such as one without extents.
            EnableVerityError::FilesystemNotSupported => self != Self::Must,
            _ => false,
        }
    }

    /// Returns true for a file that must be sealed and is not.
    pub fn misses(self, path: &Path) -> bool {
        self == Self::Must && path.exists() && !is_sealed(path)
    }

    /// Returns the space that fs-verity adds to a regular file with `size` bytes, which may be missing yet: blocks with the
    /// digests of 128 others each, and one with the description. The file system allots multiples of `allotted` bytes.
    pub fn space(self, path: &Path, size: u64, allotted: u64) -> u64 {
        if self == Self::Off || is_sealed(path) {
            return 0;
        }
        let block = u64::from(BLOCK);
        let (mut level, mut sum) = (size.div_ceil(block), 1);
        while level > 1 {
            level = level.div_ceil(128);
            sum += level;
        }
        (sum * block).next_multiple_of(allotted.max(block))
    }
}

/// Returns true if a `prepare-root.conf` makes a composefs root that reads only files with fs-verity.
pub(crate) fn is_demanded(prepare_root: &str) -> bool {
    let file = KeyFile::new();
    let enabled =
        file.load_from_data(prepare_root, KeyFileFlags::NONE).and_then(|()| file.string("composefs", "enabled"));
    enabled.is_ok_and(|enabled| ["verity", "signed"].contains(&enabled.as_str()))
}

/// Returns the path of a loose object in a repo of the mode `bare`.
pub(crate) fn path(repo: &ostree::Repo, object: &ostree::ObjectName) -> PathBuf {
    let name = ostree::object_to_string(object.checksum(), object.object_type());
    let (prefix, rest) = name.split_at(2);
    repo.path().path().unwrap_or_default().join("objects").join(prefix).join(rest)
}

/// Seals a file without a name in `dir`.
fn try_in(dir: &Path) -> Result<(), EnableVerityError> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?);
    file.write_all(b"x")?;
    // Only a file that is open for reading alone can be sealed.
    let readable = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    drop(file);
    enable(&readable)
}

fn enable(file: &File) -> Result<(), EnableVerityError> {
    while_busy(|| fs_ioc_enable_verity(file, SHA256, BLOCK))
}

/// Repeats an attempt while the file is open for writing. A process that another thread has just forked holds its descriptors
/// until it executes a program.
fn while_busy(mut attempt: impl FnMut() -> Result<(), EnableVerityError>) -> Result<(), EnableVerityError> {
    for pause in PAUSES {
        match attempt() {
            Err(EnableVerityError::FileOpenedForWrite) => thread::sleep(Duration::from_millis(pause)),
            result => return result,
        }
    }
    attempt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_the_image_demands_fs_verity() {
        for (config, expected) in [
            ("[composefs]\nenabled=verity\n", true),
            ("[composefs]\nenabled = signed\n", true),
            ("[composefs]\nenabled=yes\n", false),
            ("[root]\nenabled=verity\n", false),
            ("", false),
            ("not a key file", false),
        ] {
            assert_eq!(is_demanded(config), expected, "{config:?}");
        }
    }

    #[test]
    fn the_space_is_that_of_the_tree_of_digests() {
        let block = u64::from(BLOCK);
        // Size of the file, and blocks that fs-verity adds.
        for (size, blocks) in [
            (0, 1_u64),
            (1, 1),
            (block, 1),
            (block + 1, 2),
            (128 * block, 2),
            (128 * block + 1, 4),
            (128 * 128 * block, 130),
            (128 * 128 * block + 1, 133),
        ] {
            for (sealer, expected) in [(Sealer::Off, 0), (Sealer::Try, blocks), (Sealer::Must, blocks)] {
                for (allotted, expected) in
                    [(512, expected), (block, expected), (16 * block, expected.next_multiple_of(16))]
                {
                    let space = sealer.space(Path::new("/missing"), size, allotted);
                    assert_eq!(space, expected * block, "{sealer:?} {size} {allotted}");
                }
            }
        }
    }

    #[test]
    fn only_a_file_that_must_be_sealed_is_missed() {
        let (file, missing) = (Path::new("/proc/self/exe"), Path::new("/missing"));
        for (sealer, path, expected) in [
            (Sealer::Must, file, true),
            (Sealer::Must, missing, false),
            (Sealer::Try, file, false),
            (Sealer::Off, file, false),
        ] {
            assert_eq!(sealer.misses(path), expected, "{sealer:?} {}", path.display());
        }
    }

    #[test]
    fn a_file_that_is_open_for_writing_is_tried_again() {
        use EnableVerityError::{FileOpenedForWrite, FilesystemNotSupported};
        // Attempts that find the file open, then the number of attempts, and true if the file is sealed.
        for (busy, expected, sealed) in [(0, 1, true), (1, 2, true), (7, 8, true), (u32::MAX, 8, false)] {
            let mut attempts = 0;
            let result = while_busy(|| {
                attempts += 1;
                if attempts > busy { Ok(()) } else { Err(FileOpenedForWrite) }
            });
            assert_eq!((attempts, result.is_ok()), (expected, sealed), "{busy}");
        }
        let mut attempts = 0;
        let result = while_busy(|| {
            attempts += 1;
            Err(FilesystemNotSupported)
        });
        assert!(matches!((attempts, result), (1, Err(FilesystemNotSupported))));
    }

    #[test]
    fn a_file_without_support_fails_only_where_all_must_be_sealed() {
        for (error, may, must) in [
            (EnableVerityError::AlreadyEnabled, true, true),
            (EnableVerityError::FilesystemNotSupported, true, false),
            (EnableVerityError::FileOpenedForWrite, false, false),
            (EnableVerityError::Io(std::io::ErrorKind::StorageFull.into()), false, false),
        ] {
            assert_eq!((Sealer::Try.accepts(&error), Sealer::Must.accepts(&error)), (may, must), "{error}");
        }
    }
}
