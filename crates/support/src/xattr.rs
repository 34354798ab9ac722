//! Extended attributes by path. The functions do not follow a symbolic link in the last component.
//!
//! tmpfs has no `user.*` attributes before Linux 6.6. There, such an attribute has a substitute of another name, which
//! these functions convert.

use std::collections::BTreeMap;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};

/// The attribute that holds the SELinux label. Its value ends with a NUL byte.
pub const LABEL: &[u8] = b"security.selinux";

/// Prefix of the substitute of a `user.*` attribute.
const SUBSTITUTE: &[u8] = b"trusted.node-image-pivot.";

/// Attribute values by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Returns all attributes of the entry at `path`, including [`LABEL`] if the kernel lists it. The map is empty if the
/// file system does not support attributes.
pub fn read(path: &Path) -> Result<Xattrs> {
    let names = match grow(|buffer| rustix::fs::llistxattr(path, buffer)) {
        Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
        other => other?,
    };
    let mut all = Xattrs::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // An attribute can be removed after it was listed, and some file systems list names that they cannot read.
        if let Some(value) = get(path, name)? {
            all.insert(real_name(name).to_vec(), value);
        }
    }
    Ok(all)
}

/// Returns the value of one attribute, or `None` if the entry does not have it. On a tmpfs this also returns a default
/// label, which [`read`] does not list.
pub fn get(path: &Path, name: &[u8]) -> Result<Option<Vec<u8>>> {
    match grow(|buffer| rustix::fs::lgetxattr(path, name, buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets one attribute; replaces its value if the entry has it.
pub fn set(path: &Path, name: &[u8], value: &[u8]) -> Result<()> {
    set_with(name, value, |name, value| rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())).map(drop)
}

/// Sets one attribute with `set`, or its substitute if `set` reports that the file system does not support `user.*`
/// attributes. Returns true if the substitute was set.
pub fn set_with(name: &[u8], value: &[u8], set: impl Fn(&[u8], &[u8]) -> Result<()>) -> Result<bool> {
    match set(name, value) {
        Err(Errno::NOTSUP) if name.starts_with(b"user.") => set(&substitute(name), value).map(|()| true),
        other => other.map(|()| false),
    }
}

/// Returns the name of the substitute of a `user.*` attribute.
fn substitute(name: &[u8]) -> Vec<u8> {
    [SUBSTITUTE, name].concat()
}

/// Returns the name of the attribute whose substitute has this name, or the name itself if it is not a substitute.
pub fn real_name(name: &[u8]) -> &[u8] {
    name.strip_prefix(SUBSTITUTE).filter(|name| name.starts_with(b"user.")).unwrap_or(name)
}

/// Removes one attribute. A missing attribute is not an error.
pub fn remove(path: &Path, name: &[u8]) -> Result<()> {
    match rustix::fs::lremovexattr(path, name) {
        Err(Errno::NODATA | Errno::NOTSUP) if name.starts_with(b"user.") => {
            match rustix::fs::lremovexattr(path, substitute(name)) {
                Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
                other => other,
            }
        }
        Err(Errno::NODATA) => Ok(()),
        other => other,
    }
}

/// Calls `get` with a small buffer, and again with one of the kernel's maximum size (64 KiB) if that is too small.
fn grow(mut get: impl FnMut(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
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
