//! Whether the new tree's sshd takes this machine's configuration and host keys: if not, it does not come up when it is
//! restarted after the switch, and nobody can log in any more.
//!
//! The words of two programs are compared, and a false refusal is worse than none: what is not known to be about the
//! machine's own files is a warning at most.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::refusal::{Findings, Refusal};
use overlay_root::{Ended, Trial};

/// Where it is, in any tree.
const PROGRAMS: [&str; 2] = ["/usr/sbin/sshd", "/usr/bin/sshd"];

/// What starts it, by the names that distributions use.
const UNITS: [&str; 4] = ["ssh.service", "sshd.service", "ssh.socket", "sshd.socket"];

/// In Fedora and its kin since 38, sshd.service pulls it in: it takes the host keys' group rights away, which the
/// sshd before needed and the new one refuses.
const MENDS_MODES: &str = "/usr/lib/systemd/system/ssh-host-keys-migration.service";

/// What one `sshd -t` makes of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    /// It would start.
    Fine,
    /// It does not take a line of its configuration.
    Configuration,
    /// It sees the host keys, and takes none of them, because of their modes.
    Modes,
    /// Likewise, because of what they are.
    Keys,
    /// It misses what is made before it is started: host keys, its user.
    NotYet,
    /// Something else.
    Unknown,
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Nothing,
    /// Neither takes it: no fault of the switch.
    BothRefuse,
    /// Only the new one does not, but that may be for another reason.
    Suspect,
    Refuse,
}

/// How sshd is used here, as the trial shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Use {
    /// Something has started it, or will.
    used: bool,
    /// The one that runs was given another configuration file, which is not what `sshd -t` reads.
    other_file: bool,
    /// A unit of the new tree corrects the modes of host keys.
    modes_mended: bool,
}

/// The answer of the new tree's sshd.
#[derive(Debug)]
pub(super) struct Asked {
    ended: Result<Ended>,
    here: Use,
}

/// Asks the new tree's sshd, if there is one. Called in the trial, which must have the merged `/etc`.
pub(super) fn ask(trial: &Trial, limit: Duration) -> Option<Asked> {
    let program = program()?;
    let here = Use {
        used: UNITS.iter().any(|unit| !masked(unit) && (runs(unit) || enabled(unit))),
        other_file: UNITS.iter().any(|unit| other_file(unit)),
        modes_mended: Path::new(MENDS_MODES).exists(),
    };
    here.used.then(|| Asked { ended: trial.run(&[program, "-t"], limit), here })
}

/// Compares it with the running system's answer. Called outside of the trial.
pub(super) fn compare(asked: Asked, limit: Duration, report: &mut Findings) {
    let Asked { ended, here } = asked;
    let new = match ended {
        Ok(ended) => ended,
        Err(error) => return report.warnings.push(format!("{error:#}")),
    };
    let says_new = says_of(&new);
    if says_new == Says::Fine {
        return;
    }
    let old = program().and_then(|program| overlay_root::run(&[program, "-t"], limit).ok());
    let words = summary(&new.stderr);
    match verdict(says_new, old.as_ref().map(says_of), here) {
        Verdict::Nothing => {}
        Verdict::BothRefuse => report.warnings.push(format!(
            "neither the running sshd nor the node image's takes this machine's configuration, and none starts with it: \
             {words}"
        )),
        Verdict::Suspect => report.warnings.push(format!(
            "sshd -t of the node image fails ({}), and the running system's does not; see that it comes up: {words}",
            new.status
        )),
        Verdict::Refuse => report.refusals.push(Refusal::Sshd(words)),
    }
}

fn verdict(new: Says, old: Option<Says>, here: Use) -> Verdict {
    if !here.used {
        return Verdict::Nothing;
    }
    match (new, old) {
        (Says::Fine | Says::NotYet, _) => Verdict::Nothing,
        (Says::Modes, _) if here.modes_mended => Verdict::Nothing,
        (Says::Unknown, Some(Says::Fine)) => Verdict::Suspect,
        (_, Some(Says::Fine)) if here.other_file => Verdict::Suspect,
        (_, Some(Says::Fine)) => Verdict::Refuse,
        (Says::Configuration, Some(Says::Configuration)) => Verdict::BothRefuse,
        // A machine without host keys, for one.
        _ => Verdict::Nothing,
    }
}

fn says_of(ended: &Ended) -> Says {
    says(ended.status.code(), &ended.stderr)
}

/// Reads what `sshd -t` said; `code` is its exit status, if a signal did not end it. It stops at the first of these:
/// the configuration, its user, the host keys, and last of all its empty directory.
fn says(code: Option<i32>, words: &str) -> Says {
    let last = words.trim().lines().last().unwrap_or_default().trim();
    match code {
        Some(0) => Says::Fine,
        // The unit makes that directory (RuntimeDirectory=), or tmpfiles; a trial has an empty /var besides. It has
        // taken everything else by then.
        Some(_) if last.starts_with("Missing privilege separation directory") => Says::Fine,
        Some(_) if last.starts_with("Privilege separation user") => Says::NotYet,
        Some(_) if last.contains("no hostkeys available") => says_of_keys(words),
        Some(_) if names_a_line(last) || last.ends_with("bad configuration options") => Says::Configuration,
        _ => Says::Unknown,
    }
}

/// None was loaded. A missing one may be made before sshd is started, or lie in the `/var` that a trial does not see.
fn says_of_keys(words: &str) -> Says {
    const UNLOADED: &str = "Unable to load host key";
    let after = |line: &'_ str, start: &str| line.trim().strip_prefix(start).map(str::to_owned);
    let quoted = |rest: String, quote| rest.split(quote).nth(1).map(str::to_owned);
    let open: Vec<_> =
        words.lines().filter_map(|line| after(line, "Permissions ")).filter_map(|rest| quoted(rest, '\'')).collect();
    // Only with a reason other than that of a system call is the name quoted.
    let refused: Vec<_> =
        words.lines().filter_map(|line| after(line, UNLOADED)).filter_map(|rest| quoted(rest, '"')).collect();
    let missing = words
        .lines()
        .filter_map(|line| after(line, &format!("{UNLOADED}: ")))
        .any(|path| !refused.contains(&path) && !open.contains(&path));
    match () {
        () if missing => Says::NotYet,
        () if refused.iter().any(|path| !open.contains(path)) => Says::Keys,
        () if !open.is_empty() => Says::Modes,
        () => Says::NotYet,
    }
}

/// `/etc/ssh/sshd_config line 7: …`, also with a colon before `line`.
fn names_a_line(text: &str) -> bool {
    let Some((path, rest)) = text.split_once(" line ") else { return false };
    path.starts_with('/') && rest.split_once(':').is_some_and(|(number, _)| number.parse::<u32>().is_ok())
}

/// The lines that tell something, the last few of them.
fn summary(words: &str) -> String {
    const MOST: usize = 4;
    let told = |line: &&str| !line.is_empty() && !line.starts_with('@') && !line.contains(": Deprecated option ");
    let lines: Vec<_> = words.lines().map(str::trim).filter(told).collect();
    lines[lines.len().saturating_sub(MOST)..].join("; ")
}

fn program() -> Option<&'static str> {
    PROGRAMS.into_iter().find(|program| Path::new(program).exists())
}

fn masked(unit: &str) -> bool {
    fs::read_link(Path::new("/etc/systemd/system").join(unit)).is_ok_and(|target| target == Path::new("/dev/null"))
}

/// Whether a target wants it, by a link as `systemctl enable` makes it.
fn enabled(unit: &str) -> bool {
    ["/etc/systemd/system", "/usr/lib/systemd/system"].iter().any(|directory| {
        fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
            Path::new(&entry.file_name()).extension().is_some_and(|is| is == "wants" || is == "requires")
                && entry.path().join(unit).symlink_metadata().is_ok()
        })
    })
}

/// The processes of a service, in the unified hierarchy or in systemd's own; none, if there is no such cgroup.
fn processes(unit: &str) -> Option<String> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd"]
        .iter()
        .find_map(|root| fs::read_to_string(format!("{root}/system.slice/{unit}/cgroup.procs")).ok())
}

fn runs(unit: &str) -> bool {
    processes(unit).is_some_and(|list| !list.trim().is_empty())
}

/// Its title has its arguments: `sshd: /usr/sbin/sshd -D -f FILE [listener]`.
fn other_file(unit: &str) -> bool {
    processes(unit).unwrap_or_default().lines().any(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(['\0', ' ']).any(|word| word.starts_with("-f")))
    })
}

#[cfg(test)]
#[path = "tests/sshd.rs"]
mod tests;
