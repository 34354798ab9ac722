//! Checks that the new tree's sshd accepts this machine's configuration and host keys. Otherwise sshd does not start when
//! it is restarted after the switch, and logins fail.
//!
//! The check compares messages of two programs, and a wrong refusal is worse than none. A message that is not known to
//! be about the machine's own files is at most a warning.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::refusal::{Findings, Refusal};
use overlay_root::Trial;
use support::command::Ended;

/// Paths of sshd, in the order in which they are tried.
const PROGRAMS: [&str; 2] = ["/usr/sbin/sshd", "/usr/bin/sshd"];

/// Units that start sshd, by the names that distributions use.
const UNITS: [&str; 4] = ["ssh.service", "sshd.service", "ssh.socket", "sshd.socket"];

/// A unit that sshd.service of Fedora 38 and later pulls in. It removes the group permissions of host keys, which an
/// older sshd needs and a newer one rejects.
const MODE_MIGRATION: &str = "/usr/lib/systemd/system/ssh-host-keys-migration.service";

/// The result of one `sshd -t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// sshd would start.
    Accepted,
    /// A line of the configuration is rejected.
    Configuration,
    /// All existing host keys are rejected because of their modes.
    Modes,
    /// All existing host keys are rejected for another reason, such as their type.
    Keys,
    /// Host keys or the sshd user are missing. They may be created before sshd starts.
    NotYet,
    /// Any other failure.
    Unknown,
}

/// The consequence of both answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Nothing,
    /// Both reject the configuration, so the switch does not make it worse.
    BothRefuse,
    /// Only the new sshd fails, but possibly not because of this machine's files.
    Suspect,
    Refuse,
}

/// The use of sshd on this machine, as seen in the trial run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Use {
    /// A unit of sshd is running or enabled.
    used: bool,
    /// The running sshd was started with `-f FILE`, but `sshd -t` reads the default file.
    other_file: bool,
    /// A unit of the new tree corrects the modes of host keys.
    modes_corrected: bool,
}

/// The result of the new tree's `sshd -t`.
#[derive(Debug)]
pub(super) struct NewSshd {
    ended: Result<Ended>,
    here: Use,
}

/// Runs `sshd -t` of the new tree, for at most `limit`. Returns `None` if sshd is missing or not in use. Must be called in
/// the trial run, with the merged `/etc`.
pub(super) fn ask(trial: &Trial, limit: Duration) -> Option<NewSshd> {
    let program = program()?;
    let here = Use {
        used: UNITS.iter().any(|unit| !masked(unit) && (runs(unit) || enabled(unit))),
        other_file: UNITS.iter().any(|unit| other_file(unit)),
        modes_corrected: Path::new(MODE_MIGRATION).exists(),
    };
    here.used.then(|| NewSshd { ended: trial.run(&[program, "-t"], limit), here })
}

/// Compares the result with that of the running system's `sshd -t`. Must be called outside of the trial run.
pub(super) fn compare(new: NewSshd, limit: Duration, report: &mut Findings) {
    let NewSshd { ended, here } = new;
    let new = match ended {
        Ok(ended) => ended,
        Err(error) => return report.warnings.push(format!("{error:#}")),
    };
    let answer = answer_of(&new);
    if answer == Answer::Accepted {
        return;
    }
    let old = program().and_then(|program| overlay_root::run(&[program, "-t"], limit).ok());
    let words = summary(&new.stderr);
    match verdict(answer, old.as_ref().map(answer_of), here) {
        Verdict::Nothing => {}
        Verdict::BothRefuse => report.warnings.push(format!(
            "the running sshd and the node image's both reject this machine's configuration, and neither can start: {words}"
        )),
        Verdict::Suspect => report.warnings.push(format!(
            "`sshd -t` of the node image failed ({}), that of the running system did not; check that sshd starts after the \
             switch: {words}",
            new.status
        )),
        Verdict::Refuse => report.refusals.push(Refusal::Sshd(words)),
    }
}

fn verdict(new: Answer, old: Option<Answer>, here: Use) -> Verdict {
    if !here.used {
        return Verdict::Nothing;
    }
    match (new, old) {
        (Answer::Accepted | Answer::NotYet, _) => Verdict::Nothing,
        (Answer::Modes, _) if here.modes_corrected => Verdict::Nothing,
        (Answer::Unknown, Some(Answer::Accepted)) => Verdict::Suspect,
        (_, Some(Answer::Accepted)) if here.other_file => Verdict::Suspect,
        (_, Some(Answer::Accepted)) => Verdict::Refuse,
        (Answer::Configuration, Some(Answer::Configuration)) => Verdict::BothRefuse,
        // For example, a machine without host keys.
        _ => Verdict::Nothing,
    }
}

fn answer_of(ended: &Ended) -> Answer {
    answer(ended.status.code(), &ended.stderr)
}

/// Classifies the stderr of `sshd -t`; `code` is its exit code, or `None` if a signal ended it. sshd checks, in this
/// order, its configuration, its user, the host keys and its empty directory, and stops at the first failure.
fn answer(code: Option<i32>, words: &str) -> Answer {
    let last = words.trim().lines().last().unwrap_or_default().trim();
    match code {
        Some(0) => Answer::Accepted,
        // The unit (RuntimeDirectory=) or tmpfiles creates that directory, and /var of the trial run is empty. sshd has
        // accepted everything else by then.
        Some(_) if last.starts_with("Missing privilege separation directory") => Answer::Accepted,
        Some(_) if last.starts_with("Privilege separation user") => Answer::NotYet,
        Some(_) if last.contains("no hostkeys available") => answer_about_keys(words),
        Some(_) if names_a_line(last) || last.ends_with("bad configuration options") => Answer::Configuration,
        _ => Answer::Unknown,
    }
}

/// Classifies the messages of an sshd that loaded no host key. A missing key may be created before sshd starts, or may be
/// in `/var`, which is empty in the trial run.
fn answer_about_keys(words: &str) -> Answer {
    const UNLOADED: &str = "Unable to load host key";
    let after = |line: &'_ str, start: &str| line.trim().strip_prefix(start).map(str::to_owned);
    let quoted = |rest: String, quote| rest.split(quote).nth(1).map(str::to_owned);
    let too_open: Vec<_> =
        words.lines().filter_map(|line| after(line, "Permissions ")).filter_map(|rest| quoted(rest, '\'')).collect();
    // sshd quotes the name unless a system call failed.
    let refused: Vec<_> =
        words.lines().filter_map(|line| after(line, UNLOADED)).filter_map(|rest| quoted(rest, '"')).collect();
    let missing = words
        .lines()
        .filter_map(|line| after(line, &format!("{UNLOADED}: ")))
        .any(|path| !refused.contains(&path) && !too_open.contains(&path));
    match () {
        () if missing => Answer::NotYet,
        () if refused.iter().any(|path| !too_open.contains(path)) => Answer::Keys,
        () if !too_open.is_empty() => Answer::Modes,
        () => Answer::NotYet,
    }
}

/// Returns true for `/etc/ssh/sshd_config line 7: …`, also with a colon before `line`.
fn names_a_line(text: &str) -> bool {
    let Some((path, rest)) = text.split_once(" line ") else { return false };
    path.starts_with('/') && rest.split_once(':').is_some_and(|(number, _)| number.parse::<u32>().is_ok())
}

/// Returns the last lines that are neither banner nor deprecation, joined to one line.
fn summary(words: &str) -> String {
    const MOST: usize = 4;
    let useful = |line: &&str| !line.is_empty() && !line.starts_with('@') && !line.contains(": Deprecated option ");
    let lines: Vec<_> = words.lines().map(str::trim).filter(useful).collect();
    lines[lines.len().saturating_sub(MOST)..].join("; ")
}

fn program() -> Option<&'static str> {
    PROGRAMS.into_iter().find(|program| Path::new(program).exists())
}

fn masked(unit: &str) -> bool {
    fs::read_link(Path::new("/etc/systemd/system").join(unit)).is_ok_and(|target| target == Path::new("/dev/null"))
}

/// Returns true if another unit wants or requires `unit` by a link as `systemctl enable` makes it.
fn enabled(unit: &str) -> bool {
    ["/etc/systemd/system", "/usr/lib/systemd/system"].iter().any(|directory| {
        fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
            Path::new(&entry.file_name()).extension().is_some_and(|is| is == "wants" || is == "requires")
                && entry.path().join(unit).symlink_metadata().is_ok()
        })
    })
}

/// Returns the process ids of a service, a line each, from the unified hierarchy or from systemd's. `None` if the service
/// has no cgroup.
fn processes(unit: &str) -> Option<String> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd"]
        .iter()
        .find_map(|root| fs::read_to_string(format!("{root}/system.slice/{unit}/cgroup.procs")).ok())
}

fn runs(unit: &str) -> bool {
    processes(unit).is_some_and(|list| !list.trim().is_empty())
}

/// Returns true if an argument of a process of `unit` begins with `-f`. sshd sets its title to
/// `sshd: /usr/sbin/sshd -D -f FILE [listener]`.
fn other_file(unit: &str) -> bool {
    processes(unit).unwrap_or_default().lines().any(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(['\0', ' ']).any(|word| word.starts_with("-f")))
    })
}

#[cfg(test)]
#[path = "tests/sshd.rs"]
mod tests;
