//! Checks of the kernel, the mounts, `/etc`, the commit and the new tree. They change nothing.

use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::base::{self, BaseChoice, Image, NoMount};
use super::elf::{Machine, machine_of};
use super::refusal::{Findings, Refusal};
use node_store::image::System;
use overlay_root::{Base, Mount};

/// Paths, relative to `/usr`, that every bootable node image has.
const REQUIRED: [&str; 4] = ["etc", "lib/os-release", "lib/systemd/systemd", "bin/true"];

/// A program, relative to `/usr`, that is never a script or a symbolic link.
const MACHINE_PROGRAM: &str = "lib/systemd/systemd";

/// Runs the checks that need no new tree: the kernel, the mounts of `usr`, and `etc`. `mounts` is the mount table, and
/// `image` finds the image of a composefs root. Returns the layers for the new `/usr`.
///
/// # Errors
/// All reasons not to switch.
pub fn check_system(mounts: &[Mount], usr: &Path, etc: &Path, image: &Image<'_>) -> Result<BaseChoice, Vec<Refusal>> {
    let mut refusals: Vec<Refusal> =
        check_kernel(overlay_root::overlay_support(), openat2_support()).into_iter().collect();
    // A kernel without overlays does not refuse one for its layers.
    let probe = |base: &Base| match refusals.is_empty() {
        true => base.probe().map_err(NoMount::from),
        false => Ok(false),
    };
    let choice = base::choose(mounts, usr, image, &probe);
    let (choice, of_usr) = choice.map_or_else(|refusal| (None, Some(refusal)), |choice| (Some(choice), None));
    refusals.extend(of_usr);
    refusals.extend(check_modules(mounts, usr));
    if rustix::fs::statvfs(etc).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        refusals.push(Refusal::EtcReadOnly);
    }
    refusals.extend(is_locked(etc).then_some(Refusal::EtcLocked));
    choice.filter(|_| refusals.is_empty()).ok_or(refusals)
}

/// Returns true if the directory is immutable or append-only, so that the merge cannot replace its entries.
fn is_locked(directory: &Path) -> bool {
    let stat = rustix::fs::statx(CWD, directory, AtFlags::empty(), StatxFlags::BASIC_STATS);
    let locked = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    stat.is_ok_and(|stat| stat.stx_attributes.intersects(locked))
}

/// Returns the refusal that follows from the kernel's answers to a first call of the mount API and of `openat2`.
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

/// Refuses a mount at, above or below the directory of the kernel modules: an overlay does not contain the mounts of its
/// lower directories.
fn check_modules(mounts: &[Mount], usr: &Path) -> Option<Refusal> {
    let modules = usr.join("lib/modules");
    let hides = |target: &&PathBuf| target.starts_with(&modules) || modules.starts_with(target);
    let below = overlay_root::mounts_below(mounts, usr);
    below.iter().find(hides).map(|target| Refusal::ModulesMounted(target.display().to_string()))
}

/// Checks that the new tree has the required files, names its system in os-release, and is built for `here`, the machine
/// of this program. `usr` is the new `/usr` directory.
pub fn check_content(usr: BorrowedFd<'_>, here: Machine) -> Vec<Refusal> {
    let mut refusals: Vec<Refusal> = REQUIRED
        .iter()
        .filter(|path| open_in_usr(usr, path, OFlags::PATH | OFlags::NOFOLLOW).is_err())
        .map(|path| Refusal::Missing { path })
        .collect();
    if !refusals.is_empty() {
        return refusals;
    }
    if !read_start(usr, "lib/os-release").is_ok_and(|text| names_a_system(&text)) {
        refusals.push(Refusal::OsRelease);
    }
    // The trial run rejects a file that is not ELF.
    let image = read_start(usr, MACHINE_PROGRAM).ok().and_then(|start| machine_of(&start));
    if let Some(image) = image.filter(|image| *image != here) {
        refusals.push(Refusal::Architecture { image, here });
    }
    refusals
}

/// Refuses a node image whose directory `/usr/local` would hide files of the machine, where `/usr/local` is a link to `/var`.
/// Both arguments are `/usr` directories.
///
/// # Errors
/// A directory of the machine cannot be read, so that its files are unknown.
pub fn check_local(booted: BorrowedFd<'_>, usr: BorrowedFd<'_>) -> Result<Option<Refusal>> {
    const LOCAL: &str = "local";
    let Ok(link) = rustix::fs::readlinkat(booted, LOCAL, Vec::new()) else { return Ok(None) };
    let new = rustix::fs::statat(usr, LOCAL, AtFlags::SYMLINK_NOFOLLOW);
    if !new.is_ok_and(|new| FileType::from_raw_mode(new.st_mode).is_dir()) {
        return Ok(None);
    }
    let local = Path::new("/proc/self/fd").join(booted.as_raw_fd().to_string()).join(LOCAL);
    let file = first_file(&local).context("cannot look for files of this machine in /usr/local")?;
    Ok(file.map(|file| {
        let file = Path::new("/usr/local").join(file.strip_prefix(&local).unwrap_or(&file));
        Refusal::LocalHidden { link: link.to_string_lossy().into_owned(), file: file.display().to_string() }
    }))
}

/// Returns the first entry below a directory that is not a directory, by name. A missing directory has none.
fn first_file(directory: &Path) -> std::io::Result<Option<PathBuf>> {
    let mut entries = Vec::new();
    for entry in support::if_found(std::fs::read_dir(directory))?.into_iter().flatten() {
        entries.push(entry?);
    }
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if !entry.file_type()?.is_dir() {
            return Ok(Some(entry.path()));
        }
        if let Some(file) = first_file(&entry.path())? {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Compares the systems that the booted and the new tree's os-release name. Another distribution or major release is a
/// warning if it is `permitted`, otherwise a refusal. Both arguments are `/usr` directories.
pub fn check_same_system(booted: BorrowedFd<'_>, usr: BorrowedFd<'_>, permitted: bool) -> Findings {
    let system = |usr| System::parse(&String::from_utf8_lossy(&read_start(usr, "lib/os-release").ok()?));
    let mut findings = Findings::default();
    if let (Some(booted), Some(image)) = (system(booted), system(usr))
        && image.differs_from(&booted)
    {
        if permitted {
            findings.warnings.push(format!("the node image is {image} and the booted system is {booted}"));
        } else {
            findings.refusals.push(Refusal::OsMismatch { image, booted });
        }
    }
    findings
}

/// Checks the commit's metadata against `machine`, as uname(2) names it. `text` and `flag` look up a metadata key; a
/// missing key is accepted.
///
/// Keys: libostree's `ostree.bootable`, coreos-assembler's `coreos-assembler.basearch`.
pub fn check_metadata(
    text: &dyn Fn(&str) -> Option<String>,
    flag: &dyn Fn(&str) -> Option<bool>,
    machine: &str,
) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if flag("ostree.bootable") == Some(false) {
        refusals.push(Refusal::Metadata("is marked as not bootable (ostree.bootable)".into()));
    }
    if let Some(arch) = text("coreos-assembler.basearch").filter(|arch| arch != machine) {
        refusals.push(Refusal::Metadata(format!("is for {arch}, and this machine is {machine}")));
    }
    refusals
}

/// Opens a path of the new tree. With `usr` as the root, an absolute link to /usr/… cannot be resolved. Images use relative
/// links.
pub fn open_in_usr(usr: BorrowedFd<'_>, path: &str, flags: OFlags) -> std::io::Result<std::fs::File> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(usr, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?.into())
}

/// Reads at most the first 64 KiB of a file: all of an os-release, and the ELF header of a program.
fn read_start(usr: BorrowedFd<'_>, path: &str) -> std::io::Result<Vec<u8>> {
    const LONGEST: u64 = 64 * 1024;
    let mut start = Vec::new();
    open_in_usr(usr, path, OFlags::RDONLY | OFlags::NONBLOCK)?.take(LONGEST).read_to_end(&mut start)?;
    Ok(start)
}

fn names_a_system(os_release: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(os_release) else { return false };
    text.lines().any(|line| line.strip_prefix("ID=").is_some_and(|id| !id.trim_matches(['"', '\'']).is_empty()))
}

#[cfg(test)]
#[path = "tests/checks.rs"]
mod tests;
