//! Conditions that must hold before anything is changed. Each refusal stands alone and says what to do.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::elf::{Machine, machine_of};
use super::refusal::Refusal;
use overlay_root::Mount;

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
