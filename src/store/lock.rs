//! One importer at a time: an advisory lock (flock) that the kernel releases when its holder dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process, or another part of this one, imports right now.
    #[error("another import holds {path}: {holder}")]
    Held {
        /// The lock file.
        path: String,
        /// Who says to hold it: process id and name, as far as known.
        holder: String,
    },
    /// The lock file could not be used.
    #[error("lock file {path}")]
    Io {
        /// The lock file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The lock; dropping it releases it. The file stays: removing it would let two holders coexist.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// Takes the lock or says who holds it. Never waits.
    pub fn try_acquire(path: &Path) -> Result<Self, LockError> {
        let fail = |source| LockError::Io { path: path.display().to_string(), source };
        let mut file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(fail)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // Who holds it is a courtesy; an unreadable file only costs the name.
                let _ = file.read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "holder unknown".to_owned(),
                    holder => holder.to_owned(),
                };
                return Err(LockError::Held { path: path.display().to_string(), holder });
            }
            Err(errno) => return Err(fail(errno.into())),
        }
        let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
        file.set_len(0).map_err(fail)?;
        file.rewind().map_err(fail)?;
        writeln!(file, "pid {} ({})", std::process::id(), name.trim()).map_err(fail)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn second_is_told_who_holds_it_and_gets_it_later() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let first = StoreLock::try_acquire(&path).unwrap();
        let refused = StoreLock::try_acquire(&path).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(first);
        StoreLock::try_acquire(&path).unwrap();
    }
}
