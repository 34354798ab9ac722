//! The one place that uses `openat-ext`: small files and trees, relative to a directory handle.
//!
//! The crate works but is no longer developed (its authors moved to `cap-std-ext`). Everything the
//! agent needs from it goes through here, so that replacing it touches this file only.

use std::io;
use std::io::Write;
use std::path::Path;

use openat_ext::OpenatDirExt;

use crate::failpoint::{self, Point};

/// A directory that the agent owns.
pub struct Directory(openat::Dir);

impl Directory {
    /// Opens `path`, creating it (and its parents, mode 0755) when it is missing.
    pub fn ensure(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        openat::Dir::open(path).map(Self)
    }

    /// Replaces `name` in one step: readers see the old content or the new, never half of it.
    /// On failure the old file is as it was.
    pub fn write_atomic(&self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        failpoint::hit(Point::Write, name)?;
        self.0.write_file_with(name, mode, |file| file.write_all(content))
    }

    /// Like [`Directory::write_atomic`], and the new content is on the disk when this returns: after a power cut at any
    /// time, readers see the old content or the new.
    pub fn write_durable(&self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        failpoint::hit(Point::Write, name)?;
        self.0.write_file_with(name, mode, |file| {
            file.write_all(content)?;
            file.flush()?;
            file.get_ref().sync_all()
        })?;
        // The name, too.
        self.0.open_file(".")?.sync_all()
    }

    /// The content of `name`, or `None` when there is no such file.
    pub fn read_optional(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(mut file) = self.0.open_file_optional(name)? else { return Ok(None) };
        let mut content = Vec::new();
        io::Read::read_to_end(&mut file, &mut content)?;
        Ok(Some(content))
    }

    /// Removes `name`, file or directory, with all below it. Nothing there is not an error.
    pub fn remove_all(&self, name: &str) -> io::Result<()> {
        failpoint::hit(Point::Remove, name)?;
        self.0.remove_all(name).map(drop)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn write_read_replace_remove() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Directory::ensure(&temp.path().join("a/b")).unwrap();
        assert_eq!(dir.read_optional("state").unwrap(), None);
        dir.write_atomic("state", 0o600, b"one").unwrap();
        dir.write_atomic("state", 0o600, b"three").unwrap();
        dir.write_durable("state", 0o600, b"two").unwrap();
        assert_eq!(dir.read_optional("state").unwrap().unwrap(), b"two");
        assert_eq!(std::fs::read_dir(temp.path().join("a/b")).unwrap().count(), 1, "no temporary file is left");
        dir.remove_all("state").unwrap();
        dir.remove_all("state").unwrap();
        assert_eq!(dir.read_optional("state").unwrap(), None);
    }
}
