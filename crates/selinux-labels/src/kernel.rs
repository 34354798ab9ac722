//! What the kernel says about SELinux: whether it enforces, in which domain this process runs, and whether it
//! may write labels that the loaded policy does not know. It asks and loads nothing; see `host::selinux` for that.
//!
//! A label that the policy does not know can be written by a process with CAP_MAC_ADMIN whose domain is allowed
//! `mac_admin` (class capability2); for all others the kernel answers EINVAL. Source: `selinux_inode_setxattr` in
//! Linux's security/selinux/hooks.c.

use std::collections::{BTreeMap, BTreeSet, HashSet};
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

/// Longer than any type's name; what is looked up as one and is longer is none.
const NAME_MAX: u32 = 4096;

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

/// The version of its format that a binary policy's name tells: 33 of `policy.33`; `None` for other names.
pub fn policy_format(name: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(name).ok()?.strip_prefix("policy.")?;
    digits.parse().ok().filter(|format: &u32| format.to_string() == digits)
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

/// The names of the types that a binary policy has; some that are none may be among them, never one is missing.
///
/// Types are stored as `length value properties bounds name`, the numbers in 32 bits, little endian (`type_read` in
/// Linux's security/selinux/ss/policydb.c, since version 24 of 2009). Aliases and attributes are stored alike: told
/// apart by `properties`, where a type itself has the lowest bit (`TYPEDATUM_PROPERTY_PRIMARY`).
pub fn types_of(policy: &[u8]) -> HashSet<&[u8]> {
    let entry = |begin: usize| {
        let number = |at: usize| policy.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let length = number(begin).filter(|length| (1..=NAME_MAX).contains(length))?;
        number(begin + 8).filter(|properties| properties & 1 == 1)?;
        policy.get(begin + 16..begin + 16 + usize::try_from(length).ok()?)
    };
    (0..policy.len()).filter_map(entry).filter(|name| name.iter().all(is_of_a_name)).collect()
}

fn is_of_a_name(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-')
}

/// The domains in which processes run, each with the names of some of them.
///
/// # Errors
/// When `/proc` cannot be listed. Processes that end meanwhile are none.
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

/// `SELINUXTYPE=` of selinux_config(5).
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
        // The lowest bit is what counts. Part of a longer name, an attribute, a role (which has no bounds before its name):
        // not a type.
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
    fn this_process_is_among_those_that_run() {
        // Without SELinux nobody has a domain; with it, this one has.
        let own = context().as_deref().and_then(type_of).map(str::to_owned);
        let running = running_domains().unwrap();
        assert!(own.is_none_or(|own| running.contains_key(&own)));
    }

    #[test]
    fn the_type_of_policy() {
        assert_eq!(policy_type("# c\nSELINUX=enforcing\nSELINUXTYPE=targeted \n").as_deref(), Some("targeted"));
        assert_eq!(policy_type("#SELINUXTYPE=mls\n"), None);
        assert_eq!(policy_type("SELINUXTYPE=../x\n"), None);
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
