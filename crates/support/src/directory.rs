//! Small files and trees relative to a directory handle.
//!
//! Only this module uses `openat-ext`, whose authors moved on to `cap-std-ext`. Replacing that crate changes this file
//! only.

use std::io;
use std::io::Write;
use std::path::Path;

use openat_ext::OpenatDirExt;

use crate::failpoint::{self, Point};

/// A directory in which only the agent writes.
pub struct Directory(openat::Dir);

impl Directory {
    /// Opens `path`. Creates it and missing parents (mode 0777 less the umask).
    pub fn ensure(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        openat::Dir::open(path).map(Self)
    }

    /// Replaces the file `name` in one step: a reader sees the old content or all of the new content. On failure the
    /// old file is unchanged.
    ///
    /// Nothing is synced. After a power cut the file may be empty or missing; see [`Directory::write_durable`].
    pub fn write_atomic(&self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        failpoint::hit(Point::Write, name)?;
        self.0.write_file_with(name, mode, |file| file.write_all(content))
    }

    /// Like [`Directory::write_atomic`], and syncs the file and its name. A power cut at any time leaves the old
    /// content or all of the new content.
    pub fn write_durable(&self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        failpoint::hit(Point::Write, name)?;
        self.0.write_file_with(name, mode, |file| {
            file.write_all(content)?;
            file.flush()?;
            file.get_ref().sync_all()
        })?;
        self.0.open_file(".")?.sync_all()
    }

    /// Returns the content of the file `name`, or `None` if the file is missing.
    pub fn read_optional(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let Some(mut file) = self.0.open_file_optional(name)? else { return Ok(None) };
        let mut content = Vec::new();
        io::Read::read_to_end(&mut file, &mut content)?;
        Ok(Some(content))
    }

    /// Removes the file or tree `name`. A missing `name` is not an error.
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
        assert_eq!(std::fs::read_dir(temp.path().join("a/b")).unwrap().count(), 1, "a temporary file is left");
        dir.remove_all("state").unwrap();
        dir.remove_all("state").unwrap();
        assert_eq!(dir.read_optional("state").unwrap(), None);
    }
}
