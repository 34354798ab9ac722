//! Checks that the agent and the running processes keep a valid SELinux domain under the node image's policy.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use rustix::fs::{Dir, OFlags};

use super::checks::open_in_usr;
use super::refusal::{Findings, Refusal};
use selinux_labels::Mode;

/// Compares the domains of the agent and of all processes with the policy in `usr`, the new `/usr` directory.
///
/// Labels of files are not checked: an agent that may not write them fails earlier, in the pull or in building the delta
/// tree.
///
/// # Errors
/// The new policy or the running processes cannot be read.
pub fn check_selinux(usr: BorrowedFd<'_>) -> Result<Findings> {
    let mode = selinux_labels::mode();
    let Some(context) = selinux_labels::context().filter(|_| mode != Mode::Disabled) else {
        return Ok(Findings::default());
    };
    let Some(policy) = policy(usr).context("cannot read the node image's SELinux policy")? else {
        return Ok(Findings::default());
    };
    let running = selinux_labels::running_domains().context("cannot list the SELinux domains of running processes")?;
    Ok(judge(mode, context, &selinux_labels::types_of(&policy), &running))
}

/// Decides by the types of the new policy; `running` has the names of the processes of each domain.
fn judge(
    mode: Mode,
    context: String,
    types: &HashSet<&[u8]>,
    running: &BTreeMap<String, BTreeSet<String>>,
) -> Findings {
    let own = selinux_labels::type_of(&context).unwrap_or(&context).to_owned();
    let knows = |domain: &str| types.contains(domain.as_bytes());
    let lost = running.iter().filter(|(domain, _)| **domain != own && !knows(domain));
    let mut warnings: Vec<_> = lost
        .map(|(domain, names)| {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            format!(
                "the node image's SELinux policy does not know the domain {domain} of these processes: {}; once that policy \
                 is loaded, they are denied almost every access until they are restarted",
                names.join(", ")
            )
        })
        .collect();
    let refusal = (!knows(&own)).then_some(Refusal::Domain { context });
    if mode == Mode::Enforcing {
        return Findings { refusals: refusal.into_iter().collect(), warnings };
    }
    warnings.extend(refusal.map(|refusal| refusal.to_string()));
    let warnings = warnings.into_iter().map(|warning| format!("if SELinux were enforcing: {warning}")).collect();
    Findings { refusals: Vec::new(), warnings }
}

/// Reads the binary policy that would be loaded: the one with the highest version, even if the kernel supports a lower
/// one only. libselinux then converts it to the kernel's version when it loads it (load_policy(8)).
fn policy(usr: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    let open = |path: &str, flags: OFlags| {
        support::if_found(open_in_usr(usr, path, flags)).with_context(|| format!("cannot open /usr/{path}"))
    };
    let read = |path: &str| -> Result<Option<Vec<u8>>> {
        let Some(mut file) = open(path, OFlags::RDONLY)? else { return Ok(None) };
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut content).with_context(|| format!("cannot read /usr/{path}"))?;
        Ok(Some(content))
    };
    let Some(config) = read("etc/selinux/config")? else { return Ok(None) };
    let Some(kind) = selinux_labels::policy_type(&String::from_utf8_lossy(&config)) else { return Ok(None) };
    let directory = format!("etc/selinux/{kind}/policy");
    let Some(listed) = open(&directory, OFlags::RDONLY | OFlags::DIRECTORY)? else { return Ok(None) };
    let mut newest = None;
    for entry in Dir::read_from(&listed).with_context(|| format!("cannot list /usr/{directory}"))? {
        let entry = entry.with_context(|| format!("cannot list /usr/{directory}"))?;
        newest = newest.max(selinux_labels::policy_format(entry.file_name().to_bytes()));
    }
    newest.map_or(Ok(None), |version| read(&format!("{directory}/policy.{version}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_missing_domain_refuses_and_those_of_others_warn() {
        let context = || "system_u:system_r:initrc_t:s0".to_owned();
        let types = |names: &[&'static str]| names.iter().map(|name| name.as_bytes()).collect::<HashSet<_>>();
        let running = |domains: &[(&str, &[&str])]| -> BTreeMap<String, BTreeSet<String>> {
            let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            domains.iter().map(|(domain, of)| ((*domain).to_owned(), names(of))).collect()
        };
        let known = running(&[("initrc_t", &["node-image-pivo"]), ("init_t", &["systemd"])]);
        let all = types(&["init_t", "initrc_t"]);
        assert_eq!(judge(Mode::Enforcing, context(), &all, &known), Findings::default());
        // The agent's own domain is a refusal and not also a warning.
        let Findings { refusals, warnings } = judge(Mode::Enforcing, context(), &types(&["init_t"]), &known);
        assert_eq!((refusals.len(), warnings.len()), (1, 0));
        assert!(refusals[0].to_string().contains("does not know system_u:system_r:initrc_t:s0"));
        let Findings { refusals, warnings } = judge(Mode::Permissive, context(), &types(&["init_t"]), &known);
        assert_eq!((refusals.len(), warnings.len()), (0, 1));
        assert!(warnings[0].starts_with("if SELinux were enforcing: the node image's SELinux policy does not know"));
        // The missing domain of another process is only a warning.
        let Findings { refusals, warnings } =
            judge(Mode::Enforcing, context(), &all, &running(&[("ptal_t", &["ptal-mlcd", "ptal-printd"])]));
        assert!(refusals.is_empty());
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("the domain ptal_t of these processes: ptal-mlcd, ptal-printd;"), "{warnings:?}");
    }

    #[test]
    fn the_policy_with_the_highest_version_is_read() {
        use std::os::fd::AsFd;
        let usr = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = usr.path().join("etc/selinux").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let read = || policy(std::fs::File::open(usr.path()).unwrap().as_fd()).unwrap();
        assert_eq!(read(), None);
        put("config", "SELINUXTYPE=targeted\n");
        assert_eq!(read(), None);
        put("targeted/policy/policy.9", "9");
        put("targeted/policy/policy.34", "34");
        put("targeted/policy/policy.035", "no version");
        put("targeted/policy/policy.36.old", "no version");
        put("targeted/policy/other.37", "no policy");
        assert_eq!(read().as_deref(), Some(&b"34"[..]));
        // A version that no kernel supports.
        put("targeted/policy/policy.4000000000", "newest");
        assert_eq!(read().as_deref(), Some(&b"newest"[..]));
    }
}
