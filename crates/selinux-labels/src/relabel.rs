//! Labels of what stays, once another SELinux policy is loaded.
//!
//! systemd labels `/dev` and `/run` when it has loaded the policy at boot (`mount_setup` in its src/core); nobody does
//! that for a policy that is loaded later, and what is there keeps the labels of a policy that is gone. systemd labels
//! everything, as nobody uses it yet. Here it is in use: only what has the label that the one policy has for its path is
//! given that of the other. What somebody labelled otherwise, such as the files of containers, stays as it is. The same
//! holds for entries of `/etc` that are equal in both: the merge does not write them.
//!
//! On a disk `/etc` is the node image's at the next boot already, and the policy that gets loaded may still be the
//! bootimage's (a newer version of the format is not understood). systemd, which takes labels from `/etc`, is then refused
//! those that only the node image's policy knows, and what it wanted to label stays as the file system made it.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ostree::gio;
use rustix::fs::{Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tracing::warn;

use crate::contexts::{Contexts, Texts};
use crate::open_contexts;
use crate::{policy_type, type_of};
use support::xattr;

/// What is labelled, each without what is mounted below. `/var` is not: no update of an ostree system labels it.
pub const LABELLED: [&str; 3] = ["/dev", "/etc", "/run"];

/// Deeper than this nobody looks; whoever may write to a directory of these could make it as deep as he likes.
const DEPTH: usize = 64;

/// Which labels one policy has for paths.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FileContexts(Texts);

/// How labelling went.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Relabelled {
    /// How many have another label now.
    pub changed: usize,
    /// What could not be labelled, and why.
    pub failed: Vec<String>,
}

impl FileContexts {
    /// Of `layers`, directories such as `/usr/etc/selinux`: the first that has a file counts, as in an overlay. Where
    /// there is no policy, there are none.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(layers: &[&Path]) -> Result<Self> {
        let Some(config) = first(layers, Path::new("config"))? else { return Ok(Self::default()) };
        let Some(kind) = policy_type(&config) else { return Ok(Self::default()) };
        let text = |suffix: &str| -> Result<String> {
            let path = format!("{kind}/contexts/files/file_contexts{suffix}");
            Ok(first(layers, Path::new(&path))?.unwrap_or_default())
        };
        let contexts = [text("")?, text(".homedirs")?, text(".local")?];
        Ok(Self(Texts { contexts, substitutions: [text(".subs")?, text(".subs_dist")?] }))
    }

    /// Gives what lies in `directories` the labels of `to`, where it has those of this policy. With `unlabelled`, the
    /// label of a tmpfs where nobody gave one, also where it has that or its directory's, and `to` has one for it that
    /// this policy never gives: it could not be given before. `scratch` is a directory of ours.
    ///
    /// # Errors
    /// When libselinux cannot read one of the policies, but would have to: then nothing is labelled. An entry that
    /// cannot be labelled is not an error.
    pub fn relabel(
        &self,
        to: &Self,
        directories: &[&Path],
        unlabelled: Option<&str>,
        scratch: &Path,
    ) -> Result<Relabelled> {
        let mut done = Relabelled::default();
        if self == to {
            return Ok(done);
        }
        let (from, to) = (Side::new(&self.0, scratch)?, Side::new(&to.0, scratch)?);
        let given = self.0.labels().filter_map(type_of).collect();
        let walk = Walk { from, to, given, unlabelled: unlabelled.and_then(type_of) };
        for directory in directories {
            walk.start(directory, &mut done);
        }
        Ok(done)
    }
}

/// The labels of one policy. libselinux decides about paths that unusual lines may match.
struct Side<'a> {
    texts: &'a Texts,
    scratch: &'a Path,
    contexts: Option<Contexts>,
    /// Opened when it is first needed: that takes a second.
    libselinux: OnceCell<Option<ostree::SePolicy>>,
}

impl<'a> Side<'a> {
    fn new(texts: &'a Texts, scratch: &'a Path) -> Result<Self> {
        let side = Self { texts, scratch, contexts: Contexts::parse(texts), libselinux: OnceCell::new() };
        ensure!(side.contexts.is_some() || side.libselinux().is_some(), "libselinux cannot read the file contexts");
        Ok(side)
    }

    fn libselinux(&self) -> Option<&ostree::SePolicy> {
        let open = || {
            let opened = open_contexts(self.texts, self.scratch);
            opened.inspect_err(|error| warn!("libselinux cannot read the file contexts: {error}")).ok()
        };
        self.libselinux.get_or_init(open).as_ref()
    }

    /// The type that the policy has for a path; `None` if it has none.
    fn kind(&self, path: &str, mode: u32) -> Option<String> {
        let kind = |label: &str| type_of(label).map(str::to_owned);
        if let Some(found) = self.contexts.as_ref().and_then(|contexts| contexts.find(path, mode)) {
            return found.label.and_then(kind);
        }
        let label = self.libselinux()?.label(path, mode, gio::Cancellable::NONE);
        label.ok().flatten().and_then(|label| kind(&label))
    }
}

/// The text of a file in the first layer that has it; `None` also where that layer has something else in its place
/// (a whiteout, say).
fn first(layers: &[&Path], path: &Path) -> Result<Option<String>> {
    for layer in layers {
        let path: PathBuf = layer.join(path);
        let text = match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            Ok(stat) if !stat.is_file() => return Ok(None),
            Ok(_) => std::fs::read_to_string(&path),
            Err(error) => Err(error),
        };
        return text.map(Some).with_context(|| format!("reading {}", path.display()));
    }
    Ok(None)
}

struct Walk<'a> {
    from: Side<'a>,
    to: Side<'a>,
    /// The types that `from` gives to any path.
    given: HashSet<&'a str>,
    /// The type of what nobody labelled, if that is to be labelled.
    unlabelled: Option<&'a str>,
}

/// Opens what is there, or says that it is another mount's. Devices are not opened: that would have consequences.
fn beneath(fd: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    // Not told by the device numbers: files of an overlay have those of its layers.
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(fd, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
}

impl Walk<'_> {
    fn start(&self, path: &Path, done: &mut Relabelled) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty()).and_then(|fd| Ok((rustix::fs::fstat(&fd)?, fd)));
        let (Some(text), Ok((stat, fd))) = (path.to_str(), opened) else { return };
        self.entry(fd.as_fd(), ".", text, stat.st_mode, done);
        self.directory(fd.as_fd(), text, 0, done);
    }

    /// What vanishes meanwhile is none of ours.
    fn directory(&self, fd: BorrowedFd<'_>, path: &str, depth: usize, done: &mut Relabelled) {
        let Ok(entries) = Dir::read_from(fd) else { return };
        for entry in entries.flatten() {
            // A policy is written in text.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            let found = beneath(fd, name, OFlags::PATH).and_then(rustix::fs::fstat);
            let Ok(stat) = found else { continue };
            let path = format!("{path}/{name}");
            self.entry(fd, name, &path, stat.st_mode, done);
            if stat.st_mode & 0o170_000 == 0o040_000
                && depth < DEPTH
                && let Ok(below) = beneath(fd, name, OFlags::RDONLY | OFlags::DIRECTORY)
            {
                self.directory(below.as_fd(), &path, depth + 1, done);
            }
        }
    }

    fn entry(&self, fd: BorrowedFd<'_>, name: &str, path: &str, mode: u32, done: &mut Relabelled) {
        // Of what both have, most is the same: no need to ask what it has.
        let (Some(from), Some(to)) = (self.from.kind(path, mode), self.to.kind(path, mode)) else { return };
        if from == to {
            return;
        }
        // The directory is open, and the last component is not followed.
        let at = PathBuf::from(format!("/proc/self/fd/{}/{name}", fd.as_raw_fd()));
        let Ok(Some(label)) = xattr::get(&at, xattr::LABEL) else { return };
        let Some(wanted) = wanted(&label, |has| has == from || self.nobody_gave(has, path, &to), &to) else { return };
        match xattr::set(&at, xattr::LABEL, &wanted) {
            Ok(()) => done.changed += 1,
            Err(Errno::NOENT) => {}
            Err(error) => done.failed.push(format!("{path}: {error}")),
        }
    }

    /// Whether the type that `path` has is one that it has by default, since nobody could give it the type `to`.
    fn nobody_gave(&self, has: &str, path: &str, to: &str) -> bool {
        let Some(unlabelled) = self.unlabelled.filter(|_| !self.given.contains(to)) else { return false };
        let of_directory = |side: &Side<'_>| {
            let (directory, _) = path.rsplit_once('/')?;
            side.kind(directory, 0o040_000).map(|kind| kind == has)
        };
        has != to
            && (has == unlabelled || [&self.from, &self.to].into_iter().any(|side| of_directory(side) == Some(true)))
    }
}

/// The label with the type `to`, if the one that it has is to be replaced. User, role and level stay, as with
/// restorecon(8).
fn wanted(label: &[u8], is_replaced: impl Fn(&str) -> bool, to: &str) -> Option<Vec<u8>> {
    let label = std::str::from_utf8(label).ok()?.trim_end_matches('\0');
    let mut parts: Vec<&str> = label.splitn(4, ':').collect();
    if parts.len() < 3 || !is_replaced(parts[2]) {
        return None;
    }
    parts[2] = to;
    Some(parts.join(":").bytes().chain([0]).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use rustix::mount::MountFlags;

    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn only_the_type_changes_and_only_where_it_was_the_default() {
        let after = |label: &str| {
            wanted(label.as_bytes(), |has| has == "old_t", "new_t").map(|label| String::from_utf8(label).unwrap())
        };
        assert_eq!(after("system_u:object_r:old_t:s0\0").as_deref(), Some("system_u:object_r:new_t:s0\0"));
        assert_eq!(after("root:object_r:old_t:s0:c1,c2\0").as_deref(), Some("root:object_r:new_t:s0:c1,c2\0"));
        assert_eq!(after("system_u:object_r:old_t").as_deref(), Some("system_u:object_r:new_t\0"));
        for other in ["system_u:object_r:container_file_t:s0:c1,c2\0", "system_u:object_r:new_t:s0\0", "old_t\0", "\0"]
        {
            assert_eq!(after(other), None);
        }
    }

    #[test]
    fn a_policy_in_layers() {
        let scratch = tempfile::tempdir().unwrap();
        let (upper, lower) = (scratch.path().join("upper"), scratch.path().join("lower"));
        let files = "targeted/contexts/files/file_contexts";
        put(&lower, "config", "SELINUXTYPE=targeted\n");
        put(&lower, files, "/a -- old\n");
        put(&lower, &format!("{files}.subs_dist"), "/b /c\n");
        put(&lower, &format!("{files}.local"), "/l -- l\n");
        put(&upper, files, "/a -- new\n");
        // Where an overlay has a whiteout.
        std::os::unix::fs::symlink("/dev/null", upper.join(format!("{files}.local"))).unwrap();
        let FileContexts(texts) = FileContexts::read(&[&upper, &lower]).unwrap();
        assert_eq!(texts.contexts, ["/a -- new\n".to_owned(), String::new(), String::new()]);
        assert_eq!(texts.substitutions, [String::new(), "/b /c\n".to_owned()]);
        let FileContexts(texts) = FileContexts::read(&[&lower]).unwrap();
        assert_eq!(texts.contexts[2], "/l -- l\n");
        assert_eq!(FileContexts::read(&[&scratch.path().join("none")]).unwrap(), FileContexts::default());
    }

    /// With any label: without SELinux, the kernel stores whatever root likes. On an overlay, as `/etc` of live media is.
    #[test]
    fn what_has_the_old_label_gets_the_new_one() {
        if crate::mode() != crate::Mode::Disabled {
            return;
        }
        support::testing::private(|scratch| {
            let label = |path: &Path, of: &str| {
                xattr::set(path, xattr::LABEL, format!("system_u:object_r:{of}:s0\0").as_bytes()).unwrap();
            };
            let (lower, run) = (scratch.join("lower"), scratch.join("run"));
            for directory in ["lower", "upper", "work", "run"] {
                fs::create_dir(scratch.join(directory)).unwrap();
            }
            rustix::mount::mount("lower", &lower, "tmpfs", MountFlags::empty(), None).unwrap();
            for path in ["app/sock", "app/own", "app/mounted", "same"] {
                put(&lower, path, "");
            }
            std::os::unix::fs::symlink("../same", lower.join("app/link")).unwrap();
            for path in ["app", "app/sock", "app/link", "app/mounted", "same"] {
                label(&lower.join(path), "run_t");
            }
            label(&lower.join("app/own"), "container_file_t");
            put(scratch, "elsewhere", "");
            label(&scratch.join("elsewhere"), "run_t");
            let layers = ["lower", "upper", "work"].map(|name| format!("{name}dir={}", scratch.join(name).display()));
            let options = std::ffi::CString::new(layers.join(",")).unwrap();
            rustix::mount::mount("run", &run, "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
            rustix::mount::mount_bind(scratch.join("elsewhere"), run.join("app/mounted")).unwrap();

            let contexts = |lines: &str| {
                let contexts = [lines.replace("RUN", run.to_str().unwrap()), String::new(), String::new()];
                FileContexts(Texts { contexts, ..Texts::default() })
            };
            let old = contexts("RUN(/.*)? system_u:object_r:run_t:s0\n");
            let new = contexts("RUN(/.*)? system_u:object_r:run_t:s0\nRUN/app(/.*)? system_u:object_r:app_t:s0\n");
            let tmpfs = Some("system_u:object_r:tmpfs_t:s0");
            let is = |path: &str| {
                let label = xattr::get(&run.join(path), xattr::LABEL).unwrap().unwrap();
                type_of(&String::from_utf8(label).unwrap()).unwrap().to_owned()
            };
            let all = || ["app", "app/sock", "app/link", "app/own", "app/mounted", "same"].map(is);
            assert_eq!(old.relabel(&old, &[&run], tmpfs, scratch).unwrap(), Relabelled::default());
            let three = Relabelled { changed: 3, failed: Vec::new() };
            assert_eq!(old.relabel(&new, &[&run, Path::new("/nonexistent")], tmpfs, scratch).unwrap(), three);
            assert_eq!(all(), ["app_t", "app_t", "app_t", "container_file_t", "run_t", "run_t"]);
            // Done again, nothing is to do; and there is a way back.
            assert_eq!(old.relabel(&new, &[&run], tmpfs, scratch).unwrap(), Relabelled::default());
            assert_eq!(new.relabel(&old, &[&run], None, scratch).unwrap(), three);
            assert_eq!(all(), ["run_t", "run_t", "run_t", "container_file_t", "run_t", "run_t"]);

            // An unusual line is libselinux's.
            let unusual = contexts(
                "/ root:object_r:root_t:s0\nRUN(/.*)? system_u:object_r:run_t:s0\n\
                 RUN/ap[p]|/odd system_u:object_r:odd_t:s0\n",
            );
            assert_eq!(old.relabel(&unusual, &[&run], None, scratch).unwrap(), three);
            assert_eq!(all(), ["odd_t", "odd_t", "odd_t", "container_file_t", "run_t", "run_t"]);
            assert_eq!(unusual.relabel(&old, &[&run], None, scratch).unwrap(), three);
            // One that libselinux refuses, too: nothing is labelled.
            assert!(old.relabel(&contexts("/é system_u:object_r:x_t:s0\n"), &[&run], None, scratch).is_err());

            // What nobody could label before has what the file system or its directory gave it.
            let old = contexts("RUN(/.*)? system_u:object_r:run_t:s0\nRUN/app/.* system_u:object_r:sock_t:s0\n");
            let like = |text: &str| contexts(&format!("RUN(/.*)? system_u:object_r:run_t:s0\nRUN/app/.* {text}\n"));
            label(&run.join("app/sock"), "tmpfs_t");
            for (to, with, expected) in [
                ("system_u:object_r:new_t:s0", None, ["run_t", "tmpfs_t", "run_t", "container_file_t"]),
                ("system_u:object_r:run_t:s0", tmpfs, ["run_t", "tmpfs_t", "run_t", "container_file_t"]),
                ("system_u:object_r:new_t:s0", tmpfs, ["run_t", "new_t", "new_t", "container_file_t"]),
            ] {
                old.relabel(&like(to), &[&run], with, scratch).unwrap();
                assert_eq!(all()[..4], expected, "{to} {with:?}");
            }
        });
    }
}
