//! What must be true before anything is changed. Each refusal stands alone and says what to do.

use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags, StatVfsMountFlags};

use crate::mount::{self, DetachedTree, Mount};

/// One reason not to switch.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The kernel has no overlay file system.
    #[error("this kernel has no overlay file system; load or enable overlay")]
    NoOverlay,
    /// The overlay would lie on too many others.
    #[error(
        "the booted /usr is already made of {depth} overlays and the kernel allows one more on at most 1; \
         undo `systemd-sysext merge` or `ostree admin unlock`, whichever made it"
    )]
    TooDeep {
        /// How many there are.
        depth: usize,
    },
    /// Something every node image has is missing from this one.
    #[error("the node image lacks /usr/{path}, which every bootable system has; use another node image")]
    Missing {
        /// Relative to `/usr`.
        path: &'static str,
    },
    /// os-release says nothing.
    #[error("the node image's /usr/lib/os-release does not name a system (no ID=); use another node image")]
    OsRelease,
    /// A program of the new tree does not run here.
    #[error("{0}; the node image does not run on this machine (another CPU, or a broken C library?)")]
    Trial(String),
    /// `/etc` cannot be written.
    #[error("/etc is mounted read-only; make it writable first")]
    EtcReadOnly,
}

/// All the reasons, none of them hidden by another.
#[derive(Debug)]
pub struct Refusals(pub Vec<Refusal>);

impl fmt::Display for Refusals {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("refused before anything was changed: /usr and /etc are as they were")?;
        self.0.iter().try_for_each(|refusal| write!(out, "\n  {refusal}"))
    }
}

impl std::error::Error for Refusals {}

/// Paths, relative to `/usr`, that every node image has.
const REQUIRED: [&str; 3] = ["lib/os-release", "lib/systemd/systemd", "bin/true"];

/// Programs of the new tree that must run.
const PROGRAMS: [&[&str]; 2] = [&["/usr/bin/true"], &["/usr/lib/systemd/systemd", "--version"]];

/// How long a program of the trial run may take. Generous: an emulated machine is slow.
const TRIAL_TIME: Duration = Duration::from_secs(60);

/// Checks that can be made before there is a new tree: the kernel, the stacking depth, `/etc`.
/// Nothing is changed.
pub fn check_system(mounts: &[Mount], usr: &Path, etc: &Path) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if !mount::supports_overlay() {
        refusals.push(Refusal::NoOverlay);
    }
    let depth = mount::overlay_depth(mounts, usr);
    if depth > 1 {
        refusals.push(Refusal::TooDeep { depth });
    }
    if rustix::fs::statvfs(etc).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        refusals.push(Refusal::EtcReadOnly);
    }
    refusals
}

/// Checks of the new `/usr`: what it must hold, and that its programs run here. Nothing is changed.
pub fn check_tree(tree: &DetachedTree) -> Vec<Refusal> {
    let mut refusals = check_content(tree.as_fd());
    if !refusals.is_empty() {
        return refusals;
    }
    refusals.extend(PROGRAMS.iter().filter_map(|argv| try_program(tree, argv)));
    refusals
}

/// The part of [`check_tree`] that only looks: `usr` is the new `/usr` directory.
pub fn check_content(usr: BorrowedFd<'_>) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> = REQUIRED
        .iter()
        .filter(|path| open(usr, path, OFlags::PATH | OFlags::NOFOLLOW).is_err())
        .map(|path| Refusal::Missing { path })
        .collect();
    if refusals.is_empty() && !os_release_names_a_system(usr).unwrap_or(false) {
        refusals.push(Refusal::OsRelease);
    }
    refusals
}

fn open(usr: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<std::fs::File> {
    // A link to /usr/… leads nowhere from here, so only relative ones count; images use those.
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let fd = rustix::fs::openat2(usr.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
        .with_context(|| format!("opening /usr/{path} of the node image"))?;
    Ok(fd.into())
}

fn os_release_names_a_system(usr: BorrowedFd<'_>) -> Result<bool> {
    const LONGEST: u64 = 64 * 1024;
    let mut text = String::new();
    open(usr, "lib/os-release", OFlags::RDONLY | OFlags::NONBLOCK)?.take(LONGEST).read_to_string(&mut text)?;
    Ok(text.lines().any(|line| line.strip_prefix("ID=").is_some_and(|id| !id.trim_matches(['"', '\'']).is_empty())))
}

fn try_program(tree: &DetachedTree, argv: &[&str]) -> Option<Refusal> {
    match mount::trial(tree, argv, TRIAL_TIME) {
        Ok(trial) if trial.status.success() => None,
        Ok(trial) => {
            let words = trial.stderr.trim().lines().last().unwrap_or_default().to_owned();
            Some(Refusal::Trial(format!("trial run of {}: {}: {words}", argv.join(" "), trial.status)))
        }
        Err(error) => Some(Refusal::Trial(format!("{error:#}"))),
    }
}
