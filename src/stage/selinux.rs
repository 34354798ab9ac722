//! Whether this agent may do under SELinux what the switch needs, judged before anything changes.

use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use rustix::fs::{Mode as FileMode, OFlags, ResolveFlags};

use super::preflight::Refusal;
use crate::selinux::{self, Mode};

/// The reasons against the switch, and what is none but should be known, a line each. `usr` is the new `/usr`. Nothing is
/// changed.
///
/// The labels themselves are no matter here: whoever may not write them has failed to pull, or to build the delta tree.
///
/// # Errors
/// When the kernel or the new policy cannot be asked.
pub fn check_selinux(usr: BorrowedFd<'_>) -> Result<(Vec<Refusal>, Vec<String>)> {
    let mode = selinux::mode();
    let Some(context) = selinux::context().filter(|_| mode != Mode::Disabled) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let policy = policy(usr).context("reading the node image's SELinux policy")?;
    let domain = selinux::type_of(&context).unwrap_or(&context);
    let stays = policy.is_none_or(|policy| selinux::policy_has_type(&policy, domain));
    Ok(judge(mode, context, stays))
}

/// `stays`: whether the policy that will be loaded knows the domain that mounts the new `/usr`.
fn judge(mode: Mode, context: String, stays: bool) -> (Vec<Refusal>, Vec<String>) {
    if stays {
        return (Vec::new(), Vec::new());
    }
    let refusal = Refusal::Domain { context };
    match mode {
        Mode::Enforcing => (vec![refusal], Vec::new()),
        Mode::Permissive | Mode::Disabled => (Vec::new(), vec![format!("were SELinux enforcing: {refusal}")]),
    }
}

/// The binary policy that the kernel would be given: the newest that it takes.
fn policy(usr: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    let open = |path: &str, flags| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(usr, path, flags | OFlags::CLOEXEC, FileMode::empty(), resolve) {
            Ok(fd) => Ok(Some(std::fs::File::from(fd))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno).with_context(|| format!("opening /usr/{path}")),
        }
    };
    let read = |path: &str| -> Result<Option<Vec<u8>>> {
        let Some(mut file) = open(path, OFlags::RDONLY)? else { return Ok(None) };
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut content).with_context(|| format!("reading /usr/{path}"))?;
        Ok(Some(content))
    };
    let Some(config) = read("etc/selinux/config")? else { return Ok(None) };
    let Some(kind) = policy_type(&String::from_utf8_lossy(&config)) else { return Ok(None) };
    for version in (15..=selinux::policy_version().context("asking for the policy's version")?).rev() {
        if let Some(policy) = read(&format!("etc/selinux/{kind}/policy/policy.{version}"))? {
            return Ok(Some(policy));
        }
    }
    Ok(None)
}

/// `SELINUXTYPE=` of selinux_config(5).
fn policy_type(config: &str) -> Option<String> {
    let value = config.lines().filter_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).next_back()?;
    let value = value.trim();
    (!value.is_empty() && !value.contains('/')).then(|| value.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_that_the_new_policy_lacks_is_refused_where_it_matters() {
        let context = || "system_u:system_r:initrc_t:s0".to_owned();
        assert_eq!(judge(Mode::Enforcing, context(), true), (Vec::new(), Vec::new()));
        let (refusals, warnings) = judge(Mode::Enforcing, context(), false);
        assert_eq!((refusals.len(), warnings.len()), (1, 0));
        assert!(refusals[0].to_string().contains("does not know system_u:system_r:initrc_t:s0"));
        let (refusals, warnings) = judge(Mode::Permissive, context(), false);
        assert_eq!((refusals.len(), warnings.len()), (0, 1));
        assert!(warnings[0].starts_with("were SELinux enforcing: "));
    }

    #[test]
    fn the_type_of_policy() {
        assert_eq!(policy_type("# c\nSELINUX=enforcing\nSELINUXTYPE=targeted \n").as_deref(), Some("targeted"));
        assert_eq!(policy_type("#SELINUXTYPE=mls\n"), None);
        assert_eq!(policy_type("SELINUXTYPE=../x\n"), None);
    }
}
