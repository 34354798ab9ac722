//! What the kernel says about SELinux: whether it enforces, in which domain this process runs, and whether it
//! may write labels that the loaded policy does not know. It asks and loads nothing; see `host::selinux` for that.
//!
//! A label that the policy does not know can be written by a process with CAP_MAC_ADMIN whose domain is allowed
//! `mac_admin` (class capability2); for all others the kernel answers EINVAL. Source: `selinux_inode_setxattr` in
//! Linux's security/selinux/hooks.c.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{Mode as FileMode, OFlags, XattrFlags};
use rustix::io::Errno;

/// The attribute that holds a label.
pub const ATTRIBUTE: &str = "security.selinux";

/// Where the kernel is asked.
const KERNEL: &str = "/sys/fs/selinux";

/// A label that no policy knows.
const UNKNOWN: &[u8] = b"system_u:object_r:node_image_pivot_probe_t:s0\0";

/// How SELinux stands on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The kernel has none, or no policy is loaded.
    Disabled,
    /// What the policy forbids is logged, and done. What it cannot express, such as an unknown label, still fails.
    Permissive,
    /// What the policy forbids fails.
    Enforcing,
}

/// Asks the kernel. What cannot be told counts as enforcing: the answer decides how much may fail.
pub fn mode() -> Mode {
    mode_of(fs::read(Path::new(KERNEL).join("enforce")))
}

fn mode_of(enforce: io::Result<Vec<u8>>) -> Mode {
    match enforce {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Mode::Disabled,
        Ok(text) if text.starts_with(b"0") => Mode::Permissive,
        _ => Mode::Enforcing,
    }
}

/// The newest version of a binary policy that this kernel takes.
pub fn policy_version() -> io::Result<u32> {
    let text = fs::read_to_string(Path::new(KERNEL).join("policyvers"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// The context of this process, such as `system_u:system_r:install_t:s0`; `None` where there is none.
pub fn context() -> Option<String> {
    let text = fs::read("/proc/self/attr/current").ok()?;
    let text = String::from_utf8(text).ok()?;
    let text = text.trim_end_matches(['\0', '\n']);
    (!text.is_empty()).then(|| text.to_owned())
}

/// The type in a context; of a process it is called its domain.
pub fn type_of(context: &str) -> Option<&str> {
    context.split(':').nth(2)
}

/// Whether this process may write labels that the loaded policy does not know, on the file system of `directory`.
/// Tried with a nameless file, which nobody else sees.
///
/// # Errors
/// When no file can be made there.
pub fn may_write_unknown(directory: &Path) -> io::Result<bool> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(directory, flags, FileMode::empty())?.into();
    match rustix::fs::fsetxattr(&file, ATTRIBUTE, UNKNOWN, XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// What a process in the wrong domain is told: which one it is, what that lacks, and the way out.
pub fn advice(context: Option<&str>) -> String {
    let domain = context.and_then(type_of).unwrap_or("an unknown domain");
    format!(
        "this agent runs in the SELinux domain {domain}, which may not write labels that the loaded policy does not \
         know (mac_admin); run it in install_t: label its program install_exec_t (packaging/selinux and \
         docs/selinux.md of node-image-pivot), then systemctl restart node-image-pivotd.service"
    )
}

/// Whether a binary policy has a type of this name.
///
/// Types are stored as `length value properties bounds name`, the numbers in 32 bits, little endian (`type_read` in
/// Linux's security/selinux/ss/policydb.c, since version 24 of 2009). Aliases and attributes are stored alike: told
/// apart by `properties`, where a type itself has the lowest bit (`TYPEDATUM_PROPERTY_PRIMARY`).
pub fn policy_has_type(policy: &[u8], name: &str) -> bool {
    let Ok(length) = u32::try_from(name.len()) else { return false };
    if name.is_empty() {
        return false;
    }
    policy.windows(name.len()).enumerate().any(|(begin, window)| {
        let number = |offset: usize| {
            let bytes = begin.checked_sub(offset).and_then(|from| policy.get(from..from + 4))?;
            bytes.try_into().ok().map(u32::from_le_bytes)
        };
        window == name.as_bytes()
            && number(16) == Some(length)
            && number(8).is_some_and(|properties| properties & 1 == 1)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn how_it_stands() {
        assert_eq!(mode_of(Err(io::ErrorKind::NotFound.into())), Mode::Disabled);
        assert_eq!(mode_of(Ok(b"0".to_vec())), Mode::Permissive);
        assert_eq!(mode_of(Ok(b"1".to_vec())), Mode::Enforcing);
        assert_eq!(mode_of(Err(io::ErrorKind::PermissionDenied.into())), Mode::Enforcing);
    }

    #[test]
    fn the_type_in_a_context() {
        assert_eq!(type_of("system_u:system_r:install_t:s0-s0:c0.c1023"), Some("install_t"));
        assert_eq!(type_of("kernel"), None);
        assert!(advice(Some("system_u:system_r:initrc_t:s0")).contains("domain initrc_t,"));
    }

    #[test]
    fn types_are_found_in_a_binary_policy() {
        let entry = |name: &str, properties: u32| {
            let numbers = [u32::try_from(name.len()).unwrap(), 7, properties, 0];
            let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            bytes.extend_from_slice(name.as_bytes());
            bytes
        };
        // The lowest bit is what counts. Part of a longer name, an attribute, a role (which has no bounds before its name): not a type.
        let policy = [entry("an_install_t", 9), entry("domain", 3 & !1), b"install_t".to_vec()].concat();
        assert!(policy_has_type(&policy, "an_install_t"));
        assert!(!policy_has_type(&policy, "install_t"));
        assert!(!policy_has_type(&policy, "domain"));
        assert!(policy_has_type(&[policy, entry("install_t", 1)].concat(), "install_t"));
        assert!(!policy_has_type(b"install_t", "install_t") && !policy_has_type(b"", "install_t"));
    }

    #[test]
    fn whoever_tries_a_label_leaves_none() {
        let temp = tempfile::tempdir().unwrap();
        let label = || {
            let mut value = [0; 256];
            rustix::fs::getxattr(temp.path(), ATTRIBUTE, &mut value).map(|length| value[..length].to_vec())
        };
        let before = label();
        may_write_unknown(temp.path()).unwrap();
        assert_eq!(label(), before, "that of the directory");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        assert!(may_write_unknown(&temp.path().join("nowhere")).is_err());
    }
}
