//! The kernel's SELinux state: the mode, the domain of this process, and the permission to write labels that the loaded
//! policy does not know. Also reads binary policies and `/etc/selinux/config`.
//!
//! A process with CAP_MAC_ADMIN whose domain has the permission `mac_admin` (class capability2) may write a label that
//! the loaded policy does not know. For all others the kernel returns EINVAL. Source: `selinux_inode_setxattr` in
//! Linux's security/selinux/hooks.c.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{Mode as FileMode, OFlags, XattrFlags};
use rustix::io::Errno;

/// The extended attribute that holds a label.
pub const ATTRIBUTE: &str = "security.selinux";

const KERNEL: &str = "/sys/fs/selinux";

/// A label that is in no policy.
const UNKNOWN: &[u8] = b"system_u:object_r:node_image_pivot_probe_t:s0\0";

/// Bytes of the longest name that [`types_of`] accepts. Types in real policies have much shorter names.
const NAME_MAX: u32 = 4096;

/// The SELinux mode of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The kernel has no SELinux, or no policy is loaded.
    Disabled,
    /// The kernel logs accesses that the policy forbids, and allows them. Writing an unknown label still fails.
    Permissive,
    /// The kernel refuses accesses that the policy forbids.
    Enforcing,
}

/// Returns the kernel's mode. An unreadable mode counts as enforcing, because callers tolerate failures in the others.
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

/// Returns the format version in the name of a binary policy: 33 for `policy.33`. `None` for other names.
pub fn policy_format(name: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(name).ok()?.strip_prefix("policy.")?;
    digits.parse().ok().filter(|format: &u32| format.to_string() == digits)
}

/// Returns the context of this process, for example `system_u:system_r:install_t:s0`. `None` without SELinux.
pub fn context() -> Option<String> {
    let text = fs::read("/proc/self/attr/current").ok()?;
    let text = String::from_utf8(text).ok()?;
    let text = text.trim_end_matches(['\0', '\n']);
    (!text.is_empty()).then(|| text.to_owned())
}

/// Returns the type, the third field of a context. The type of a process is called its domain.
pub fn type_of(context: &str) -> Option<&str> {
    context.split(':').nth(2)
}

/// Returns true if this process may write labels that the loaded policy does not know, on the file system of
/// `directory`. Tries it with an unnamed file (`O_TMPFILE`), which no other process can see.
///
/// # Errors
/// `directory` is missing, or its file system refuses the file or the attribute for another reason.
pub fn may_write_unknown(directory: &Path) -> io::Result<bool> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(directory, flags, FileMode::empty())?.into();
    match rustix::fs::fsetxattr(&file, ATTRIBUTE, UNKNOWN, XattrFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns the explanation for a process that may not write unknown labels: its domain, the missing permission and the
/// remedy. `context` is the context of the process.
pub fn advice(context: Option<&str>) -> String {
    let domain = context.and_then(type_of).unwrap_or("an unknown domain");
    format!(
        "the agent runs in the SELinux domain {domain}, which lacks the permission (mac_admin) to write labels that the \
         loaded policy does not know; label its program install_exec_t, so that it runs in install_t (see \
         docs/selinux.md of node-image-pivot), then run systemctl restart node-image-pivotd.service"
    )
}

/// Returns the names of all types in a binary policy. The set can also contain strings that are not types, because the
/// function searches for the encoding of a type instead of parsing the policy.
///
/// A type is stored as `length value properties bounds name`, with 32-bit little-endian numbers (`type_read` in Linux's
/// security/selinux/ss/policydb.c, since version 24 of 2009). Aliases and attributes have the same layout; in their
/// `properties` the lowest bit (`TYPEDATUM_PROPERTY_PRIMARY`) is not set.
pub fn types_of(policy: &[u8]) -> HashSet<&[u8]> {
    let entry = |begin: usize| {
        let number = |at: usize| policy.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let length = number(begin).filter(|length| (1..=NAME_MAX).contains(length))?;
        number(begin + 8).filter(|properties| properties & 1 == 1)?;
        policy.get(begin + 16..begin + 16 + usize::try_from(length).ok()?)
    };
    (0..policy.len()).filter_map(entry).filter(|name| name.iter().all(is_name_byte)).collect()
}

fn is_name_byte(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')
}

/// Returns the domains of all running processes, each with the names of its processes. Skips processes that end during
/// the call.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn running_domains() -> io::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut domains: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let (Some(context), Some(name)) = (read("attr/current"), read("comm")) else { continue };
        if let Some(domain) = type_of(context.trim_end_matches(['\0', '\n'])) {
            domains.entry(domain.to_owned()).or_default().insert(name.trim_end().to_owned());
        }
    }
    Ok(domains)
}

/// Returns the value of `SELINUXTYPE=` in the text of `/etc/selinux/config`, see selinux_config(5).
pub fn policy_type(config: &str) -> Option<String> {
    let value = config.lines().filter_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).next_back()?;
    let value = value.trim();
    (!value.is_empty() && !value.contains('/')).then(|| value.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_mode_counts_as_enforcing() {
        assert_eq!(mode_of(Err(io::ErrorKind::NotFound.into())), Mode::Disabled);
        assert_eq!(mode_of(Ok(b"0".to_vec())), Mode::Permissive);
        assert_eq!(mode_of(Ok(b"1".to_vec())), Mode::Enforcing);
        assert_eq!(mode_of(Err(io::ErrorKind::PermissionDenied.into())), Mode::Enforcing);
    }

    #[test]
    fn advice_names_the_type_of_the_context() {
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
        // A type (lowest bit of `properties`), an attribute, and a role, whose name does not follow a `bounds` number.
        // Part of a longer name is not a type either.
        let policy = [entry("an_install_t", 9), entry("domain", 3 & !1), b"install_t".to_vec()].concat();
        let has = |policy: &[u8], name: &str| types_of(policy).contains(name.as_bytes());
        assert!(has(&policy, "an_install_t"));
        assert!(!has(&policy, "install_t"));
        assert!(!has(&policy, "domain"));
        let more = [policy, entry("install_t", 1)].concat();
        assert!(has(&more, "an_install_t") && has(&more, "install_t"));
        // Cut off in the middle of a name.
        assert!(!has(&more[..more.len() - 1], "install_t"));
        assert!(types_of(b"install_t").is_empty() && types_of(b"").is_empty());
    }

    #[test]
    fn running_domains_include_the_domain_of_this_process() {
        // Without SELinux, processes have no domain.
        let own = context().as_deref().and_then(type_of).map(str::to_owned);
        let running = running_domains().unwrap();
        assert!(own.is_none_or(|own| running.contains_key(&own)));
    }

    #[test]
    fn policy_type_is_read_from_the_configuration() {
        assert_eq!(policy_type("# c\nSELINUX=enforcing\nSELINUXTYPE=targeted \n").as_deref(), Some("targeted"));
        assert_eq!(policy_type("#SELINUXTYPE=mls\n"), None);
        assert_eq!(policy_type("SELINUXTYPE=../x\n"), None);
    }

    #[test]
    fn probing_for_unknown_labels_leaves_no_trace() {
        let temp = tempfile::tempdir().unwrap();
        let label = || {
            let mut value = [0; 256];
            rustix::fs::getxattr(temp.path(), ATTRIBUTE, &mut value).map(|length| value[..length].to_vec())
        };
        let before = label();
        may_write_unknown(temp.path()).unwrap();
        assert_eq!(label(), before, "the label of the directory changed");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        assert!(may_write_unknown(&temp.path().join("nowhere")).is_err());
    }
}
