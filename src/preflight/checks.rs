//! Conditions that must hold before anything is changed. Each refusal stands alone and says what to do.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::elf::{Machine, machine_of};
use super::memory::Need;
use overlay_root::Mount;
use support::human_bytes;

/// One reason not to switch.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// A system call that the switch is made of is missing.
    #[error("this kernel lacks {feature}; boot a bootimage with Linux {since} or later")]
    OldKernel {
        /// What is missing.
        feature: &'static str,
        /// The first version that has it.
        since: &'static str,
    },
    /// The kernel has no overlay file system.
    #[error("this kernel has no overlay file system; load or enable overlay")]
    NoOverlay,
    /// The daemon has not the right to mount.
    #[error("the daemon may not mount (no CAP_SYS_ADMIN); run it with the unit that is shipped")]
    NotAllowed,
    /// The overlay would lie on too many others.
    #[error(
        "the booted /usr is already made of {} stacked overlays ({}) and the kernel allows one more on at most 1; {}",
        layers.len(), layers.join(" over "), too_deep_remedy(layers)
    )]
    TooDeep {
        /// The mounts that are stacked, topmost first, as mount tables name them.
        layers: Vec<String>,
    },
    /// The kernel refuses the overlay for a reason of its own.
    #[error("the kernel cannot lay an overlay over /usr: {0}; use a bootimage with /usr on another file system")]
    NotStackable(String),
    /// `/usr` is on an overlay with an upper layer.
    #[error(
        "cannot tell what /usr holds: the overlay {source_name:?} makes it writable; reboot without `ostree admin unlock` \
         (`bootc usr-overlay`, `rpm-ostree usroverlay`) and without `transient = true` under [root] in \
         /etc/ostree/prepare-root.conf"
    )]
    Unlocked {
        /// Source in the mount table.
        source_name: String,
    },
    /// The booted kernel's modules are on a mount that the switch would hide.
    #[error(
        "cannot keep the modules of the running kernel: {0} is a mount point, which the new /usr would hide; unmount it"
    )]
    ModulesMounted(String),
    /// Something every node image has is missing from this one.
    #[error("the node image lacks /usr/{path}, which every bootable system has; use another node image")]
    Missing {
        /// Relative to `/usr`.
        path: &'static str,
    },
    /// os-release says nothing.
    #[error("the node image's /usr/lib/os-release does not name a system (no ID=); use another node image")]
    OsRelease,
    /// Its programs are for other machines.
    #[error("the node image is built for {image} and this machine is {here}; use the node image for {here}")]
    Architecture {
        /// What the image's programs need.
        image: Machine,
        /// What this program was built for.
        here: Machine,
    },
    /// The commit contradicts itself.
    #[error("the node image's commit says {0}; use another node image")]
    Metadata(String),
    /// Too little memory, or room, for what is still to be done.
    #[error(
        "too little {}: {} are needed ({}) and {} are free; add some, or stop something that uses it",
        need.what, human_bytes(need.sum()), need.parts(), human_bytes(need.free)
    )]
    TooLittle {
        /// The numbers.
        need: Need,
    },
    /// A program of the new tree does not run here.
    #[error("{0}; the node image does not run on this machine (another CPU, or a broken C library?)")]
    Trial(String),
    /// A login would no longer be possible; holds the words of its `sshd -t`.
    #[error(
        "the node image's sshd does not take this machine's configuration or host keys, as the running one does, and \
         would not come up again: {0}; correct /etc/ssh so that `sshd -t` of both passes, or disable and stop sshd"
    )]
    Sshd(String),
    /// `/etc` cannot be written.
    #[error("/etc is mounted read-only; make it writable first")]
    EtcReadOnly,
    /// `/etc` itself cannot be changed.
    #[error("cannot merge /etc: the directory is immutable or append-only; run `chattr -i -a /etc`")]
    EtcLocked,
    /// The kernel checks each access through the new overlay against the domain that mounted it, too.
    #[error(
        "the node image's SELinux policy does not know {context}, in which this agent runs: once that policy is loaded, \
         the kernel would deny every access to the new /usr; run the agent in a domain that both policies have \
         (install_t), or add it to the node image's policy (packaging/selinux and docs/selinux.md of node-image-pivot)"
    )]
    Domain {
        /// Of this process.
        context: String,
    },
    /// Conflicts, and the strategy is to fail.
    #[error("{0}")]
    Conflicts(String),
}

impl Refusal {
    /// Returns the stable name of the check, for `error.refusals[].id` in the status document.
    pub fn id(&self) -> &'static str {
        match self {
            Self::OldKernel { .. } => "old-kernel",
            Self::NoOverlay => "no-overlay",
            Self::NotAllowed => "not-allowed",
            Self::TooDeep { .. } => "too-deep",
            Self::NotStackable(_) => "not-stackable",
            Self::Unlocked { .. } => "unlocked",
            Self::ModulesMounted(_) => "modules-mounted",
            Self::Missing { .. } => "missing",
            Self::OsRelease => "os-release",
            Self::Architecture { .. } => "architecture",
            Self::Metadata(_) => "metadata",
            Self::TooLittle { .. } => "too-little",
            Self::Trial(_) => "trial",
            Self::Sshd(_) => "sshd",
            Self::EtcReadOnly => "etc-read-only",
            Self::EtcLocked => "etc-locked",
            Self::Domain { .. } => "domain",
            Self::Conflicts(_) => "conflicts",
        }
    }
}

fn too_deep_remedy(layers: &[String]) -> &'static str {
    match layers.first().map(String::as_str) {
        Some("sysext") => {
            "run `systemd-sysext unmerge`; the extensions cannot be merged again as long as the node image's /usr is in place"
        }
        _ => "unmount the topmost one, or use a bootimage without it",
    }
}

/// All the reasons, none of them hidden by another.
#[derive(Debug)]
pub struct Refusals(pub Vec<Refusal>);

/// Paths, relative to `/usr`, that every node image has.
const REQUIRED: [&str; 4] = ["etc", "lib/os-release", "lib/systemd/systemd", "bin/true"];

/// A program that is never a script or a link to another one.
const MACHINE_PROGRAM: &str = "lib/systemd/systemd";

/// Checks that can be made before there is a new tree: the kernel, what `/usr` is made of, `/etc`.
/// Nothing is changed.
pub fn check_system(mounts: &[Mount], usr: &Path, etc: &Path) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> =
        check_kernel(overlay_root::overlay_support(), openat2_support()).into_iter().collect();
    let of_usr = check_stack(mounts, usr);
    if refusals.is_empty() && of_usr.is_none() {
        // The mount table cannot tell everything (file systems in files count, too): the kernel can.
        refusals.extend(overlay_root::overlay_fits(usr).err().map(|error| Refusal::NotStackable(format!("{error:#}"))));
    }
    refusals.extend(of_usr);
    refusals.extend(check_modules(mounts, usr));
    if rustix::fs::statvfs(etc).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        refusals.push(Refusal::EtcReadOnly);
    }
    refusals.extend(is_locked(etc).then_some(Refusal::EtcLocked));
    refusals
}

/// Returns true if nothing can be added to the directory: the merge could not even begin.
fn is_locked(directory: &Path) -> bool {
    let stat = rustix::fs::statx(CWD, directory, AtFlags::empty(), StatxFlags::BASIC_STATS);
    let locked = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    stat.is_ok_and(|stat| stat.stx_attributes.intersects(locked))
}

/// Judges the kernel's answer to a first step of each kind of call.
fn check_kernel(overlay: Result<(), Errno>, openat2: Result<(), Errno>) -> Option<Refusal> {
    match (overlay, openat2) {
        (Err(Errno::NOSYS), _) => Some(Refusal::OldKernel { feature: "the mount API (fsopen)", since: "5.2" }),
        (Err(Errno::PERM), _) => Some(Refusal::NotAllowed),
        (Err(_), _) => Some(Refusal::NoOverlay),
        (_, Err(Errno::NOSYS)) => Some(Refusal::OldKernel { feature: "openat2", since: "5.6" }),
        _ => None,
    }
}

fn openat2_support() -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).map(drop)
}

fn check_stack(mounts: &[Mount], usr: &Path) -> Option<Refusal> {
    if let Some(source) = overlay_root::writable_overlay(mounts, usr) {
        return Some(Refusal::Unlocked { source_name: source });
    }
    let layers = overlay_root::overlay_stack(mounts, usr);
    (layers.len() > 1).then_some(Refusal::TooDeep { layers })
}

/// Refuses a mount over the kernel modules, at, above or below their directory: an overlay leaves out the mounts that are
/// on its layers.
fn check_modules(mounts: &[Mount], usr: &Path) -> Option<Refusal> {
    let modules = usr.join("lib/modules");
    let hides = |target: &&PathBuf| target.starts_with(&modules) || modules.starts_with(target);
    let below = overlay_root::mounts_below(mounts, usr);
    below.iter().find(hides).map(|target| Refusal::ModulesMounted(target.display().to_string()))
}

/// Returns what the caller should know and what is not a reason to refuse, a line each.
pub fn warnings(mounts: &[Mount], usr: &Path) -> Vec<String> {
    let mut warnings: Vec<String> = overlay_root::mounts_below(mounts, usr)
        .iter()
        .map(|hidden| {
            format!("{} is a mount point and is hidden by the new {} until an undo", hidden.display(), usr.display())
        })
        .collect();
    let stack = overlay_root::overlay_stack(mounts, usr);
    if stack.first().is_some_and(|source| source == "sysext") {
        warnings
            .push("system extensions are merged on /usr: they show through what the node image does not have".into());
    }
    if let Some(source) = stack.first() {
        warnings.push(format!(
            "the booted /usr is on an overlay ({source}): with the node image's /usr over it, the kernel accepts no further \
             overlay there (systemd-sysext merge, bootc usr-overlay, podman -v /usr/…:O) until an undo"
        ));
    }
    warnings
}

/// Looks at the new tree: what it must hold, what it calls itself, and for which machine it is. `usr` is the
/// new `/usr` directory, `here` the machine that this program was built for. Nothing is changed.
pub fn check_content(usr: BorrowedFd<'_>, here: Machine) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> = REQUIRED
        .iter()
        .filter(|path| open(usr, path, OFlags::PATH | OFlags::NOFOLLOW).is_err())
        .map(|path| Refusal::Missing { path })
        .collect();
    if !refusals.is_empty() {
        return refusals;
    }
    if !read_start(usr, "lib/os-release").is_ok_and(|text| names_a_system(&text)) {
        refusals.push(Refusal::OsRelease);
    }
    // A file that is not ELF is left to the trial run.
    let image = read_start(usr, MACHINE_PROGRAM).ok().and_then(|start| machine_of(&start));
    if let Some(image) = image.filter(|image| *image != here) {
        refusals.push(Refusal::Architecture { image, here });
    }
    refusals
}

/// Checks what the commit says about itself. `text` and `flag` look a metadata key up; `machine` is uname(2)'s
/// word. A key that is not there is no reason to refuse.
///
/// Keys: libostree's `ostree.bootable`, coreos-assembler's `coreos-assembler.basearch`.
pub fn check_metadata(
    text: &dyn Fn(&str) -> Option<String>,
    flag: &dyn Fn(&str) -> Option<bool>,
    machine: &str,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if flag("ostree.bootable") == Some(false) {
        refusals.push(Refusal::Metadata("that it is not bootable (ostree.bootable)".into()));
    }
    if let Some(arch) = text("coreos-assembler.basearch").filter(|arch| arch != machine) {
        refusals.push(Refusal::Metadata(format!("that it is for {arch}, and this machine is {machine}")));
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

/// The first part of a file: all of an os-release, more than enough of a program.
fn read_start(usr: BorrowedFd<'_>, path: &str) -> Result<Vec<u8>> {
    const LONGEST: u64 = 64 * 1024;
    let mut start = Vec::new();
    open(usr, path, OFlags::RDONLY | OFlags::NONBLOCK)?.take(LONGEST).read_to_end(&mut start)?;
    Ok(start)
}

fn names_a_system(os_release: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(os_release) else { return false };
    text.lines().any(|line| line.strip_prefix("ID=").is_some_and(|id| !id.trim_matches(['"', '\'']).is_empty()))
}

#[cfg(test)]
#[path = "tests/checks.rs"]
mod tests;
