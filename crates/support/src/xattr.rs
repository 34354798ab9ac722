//! Extended attributes by path, never through a symbolic link.

use std::collections::BTreeMap;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};

/// The security label. Never part of what makes two entries equal.
pub const LABEL: &[u8] = b"security.selinux";

/// Name to value.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// All attributes of what is at `path`, the label included. A file system without attributes has none.
pub fn read(path: &Path) -> Result<Xattrs> {
    let names = match grow(|buffer| rustix::fs::llistxattr(path, buffer)) {
        Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
        other => other?,
    };
    let mut all = Xattrs::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // Otherwise gone since it was listed, or listed only for show.
        if let Some(value) = get(path, name)? {
            all.insert(name.to_vec(), value);
        }
    }
    Ok(all)
}

/// One attribute, if it is there. A label that nobody set is there without being listed (tmpfs).
pub fn get(path: &Path, name: &[u8]) -> Result<Option<Vec<u8>>> {
    match grow(|buffer| rustix::fs::lgetxattr(path, name, buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets one attribute.
pub fn set(path: &Path, name: &[u8], value: &[u8]) -> Result<()> {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
}

/// Removes one attribute; one that is not there is no error.
pub fn remove(path: &Path, name: &[u8]) -> Result<()> {
    match rustix::fs::lremovexattr(path, name) {
        Err(Errno::NODATA) => Ok(()),
        other => other,
    }
}

/// Calls `get` with a buffer that is large enough.
fn grow(mut get: impl FnMut(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    // Most lists and values fit; the kernel's own limit is 64 KiB.
    let mut small = [0; 512];
    match get(&mut small) {
        Ok(length) => return Ok(small[..length].to_vec()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut large = vec![0; 65536];
    let length = get(&mut large)?;
    large.truncate(length);
    Ok(large)
}
