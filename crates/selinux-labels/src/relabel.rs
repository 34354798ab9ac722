//! Relabels existing entries after another SELinux policy was loaded.
//!
//! systemd relabels all of `/dev` and `/run` after it has loaded the policy at boot (`mount_setup` in its src/core).
//! After a later load of a policy, no program does that. By then the entries are in use. This module therefore relabels
//! only entries whose label is the one that the old policy assigns to their path. Entries with other labels keep them,
//! for example the files of containers. The same applies to entries of `/etc` that the merge does not write.
//!
//! On an installed disk, `/etc` is already the node image's at the next boot, but the loaded policy can be the
//! bootimage's, because the booted system may not support the newer format. The kernel then refuses the labels that
//! only the node image's policy knows, and the entries that systemd creates keep the default label of their file system
//! or directory.

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
use crate::{open_contexts, policy_type, type_of};
use support::xattr;

/// The directories to relabel, without mounts below them. `/var` is missing because no update of an ostree system
/// labels it.
pub const LABELLED: [&str; 3] = ["/dev", "/etc", "/run"];

/// Levels of directories to enter. An unprivileged user could nest directories without bound.
const DEPTH: usize = 64;

/// The file contexts of one policy: the labels that it assigns to paths.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FileContexts(Texts);

/// The result of [`FileContexts::relabel`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Relabelled {
    /// Number of entries whose label changed.
    pub changed: usize,
    /// Entries that could not be relabelled, each as `PATH: CAUSE`.
    pub failed: Vec<String>,
}

impl FileContexts {
    /// Reads the file contexts from `layers`, directories like `/usr/etc/selinux`. As in an overlay, an earlier layer
    /// hides the files of later ones. The result is empty if the layers have no policy.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(layers: &[&Path]) -> Result<Self> {
        let Some(config) = read_first(layers, Path::new("config"))? else { return Ok(Self::default()) };
        let Some(kind) = policy_type(&config) else { return Ok(Self::default()) };
        let text = |suffix: &str| -> Result<String> {
            let path = format!("{kind}/contexts/files/file_contexts{suffix}");
            Ok(read_first(layers, Path::new(&path))?.unwrap_or_default())
        };
        let contexts = [text("")?, text(".homedirs")?, text(".local")?];
        Ok(Self(Texts { contexts, substitutions: [text(".subs")?, text(".subs_dist")?] }))
    }

    /// Returns the label of the directory `path`, an absolute path. Returns `None` if the policy assigns none, or if only
    /// libselinux can interpret its lines.
    pub fn of_directory(&self, path: &Path) -> Option<String> {
        let contexts = Contexts::parse(&self.0)?;
        contexts.find(path.to_str()?, 0o040_755)?.label.map(str::to_owned)
    }

    /// Relabels the entries in `directories` (absolute paths): an entry with the type that this policy assigns to its
    /// path gets the type that `to` assigns. User, role and level stay.
    ///
    /// `unlabelled` is the default label of a tmpfs. If it is given, an entry with that type or with the type of its
    /// directory is relabelled too, if no line of this policy assigns the new type: no program could set it before.
    /// libselinux reads file contexts from files below `scratch`, an existing directory.
    ///
    /// # Errors
    /// libselinux cannot read file contexts that only it can interpret. No entry was relabelled. An entry that cannot
    /// be relabelled is not an error, see [`Relabelled::failed`].
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
        let assigned = self.0.labels().filter_map(type_of).collect();
        let walk = Walk { from, to, assigned, unlabelled: unlabelled.and_then(type_of) };
        for directory in directories {
            walk.start(directory, &mut done);
        }
        Ok(done)
    }
}

/// The types that one policy assigns. libselinux decides on paths that unusual lines may match.
struct Side<'a> {
    texts: &'a Texts,
    scratch: &'a Path,
    contexts: Option<Contexts>,
    /// Opened at its first use, because that takes about a second.
    libselinux: OnceCell<Option<ostree::SePolicy>>,
}

impl<'a> Side<'a> {
    fn new(texts: &'a Texts, scratch: &'a Path) -> Result<Self> {
        let side = Self { texts, scratch, contexts: Contexts::parse(texts), libselinux: OnceCell::new() };
        ensure!(
            side.contexts.is_some() || side.libselinux().is_some(),
            "cannot read the SELinux file contexts: libselinux refuses them"
        );
        Ok(side)
    }

    fn libselinux(&self) -> Option<&ostree::SePolicy> {
        let open = || {
            let opened = open_contexts(self.texts, self.scratch);
            opened.inspect_err(|error| warn!("libselinux cannot read the SELinux file contexts: {error}")).ok()
        };
        self.libselinux.get_or_init(open).as_ref()
    }

    /// Returns the type that the policy assigns to a path; `None` if it assigns none.
    fn assigned_type(&self, path: &str, mode: u32) -> Option<String> {
        let owned_type = |label: &str| type_of(label).map(str::to_owned);
        if let Some(found) = self.contexts.as_ref().and_then(|contexts| contexts.find(path, mode)) {
            return found.label.and_then(owned_type);
        }
        let label = self.libselinux()?.label(path, mode, gio::Cancellable::NONE);
        label.ok().flatten().and_then(|label| owned_type(&label))
    }
}

/// Returns the text of the file `path` in the first layer that has an entry with this name. Returns `None` if there is
/// none, or if that entry is not a regular file (for example a whiteout).
fn read_first(layers: &[&Path], path: &Path) -> Result<Option<String>> {
    for layer in layers {
        let path: PathBuf = layer.join(path);
        let text = match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
            Ok(stat) if !stat.is_file() => return Ok(None),
            Ok(_) => std::fs::read_to_string(&path),
            Err(error) => Err(error),
        };
        return text.map(Some).with_context(|| format!("cannot read {}", path.display()));
    }
    Ok(None)
}

struct Walk<'a> {
    from: Side<'a>,
    to: Side<'a>,
    /// The types in the lines of `from`.
    assigned: HashSet<&'a str>,
    /// The default type of a tmpfs, if entries with a default type are relabelled.
    unlabelled: Option<&'a str>,
}

/// Opens the entry `name` in `fd`, unless it is a mount point (`XDEV`). Callers open devices with `O_PATH` only,
/// because opening a device can have side effects.
fn open_beneath(fd: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    // Device numbers do not reveal a mount: files of an overlay have those of its layers.
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

    /// Relabels the entries of a directory. Skips entries that vanish during the call.
    fn directory(&self, fd: BorrowedFd<'_>, path: &str, depth: usize, done: &mut Relabelled) {
        let Ok(entries) = Dir::read_from(fd) else { return };
        for entry in entries.flatten() {
            // File contexts are ASCII: no literal text in them matches such a name.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if matches!(name, "." | "..") {
                continue;
            }
            let found = open_beneath(fd, name, OFlags::PATH).and_then(rustix::fs::fstat);
            let Ok(stat) = found else { continue };
            let path = format!("{path}/{name}");
            self.entry(fd, name, &path, stat.st_mode, done);
            if stat.st_mode & 0o170_000 == 0o040_000
                && depth < DEPTH
                && let Ok(below) = open_beneath(fd, name, OFlags::RDONLY | OFlags::DIRECTORY)
            {
                self.directory(below.as_fd(), &path, depth + 1, done);
            }
        }
    }

    fn entry(&self, fd: BorrowedFd<'_>, name: &str, path: &str, mode: u32, done: &mut Relabelled) {
        // Both policies assign the same type to most paths: skip reading the entry's label.
        let (Some(from), Some(to)) = (self.from.assigned_type(path, mode), self.to.assigned_type(path, mode)) else {
            return;
        };
        if from == to {
            return;
        }
        // Safe against renames: the directory is open, and the functions of `xattr` do not follow the last component.
        let at = PathBuf::from(format!("/proc/self/fd/{}/{name}", fd.as_raw_fd()));
        let Ok(Some(label)) = xattr::get(&at, xattr::LABEL) else { return };
        let is_replaced = |current: &str| current == from || self.is_default(current, path, &to);
        let Some(label) = with_type(&label, is_replaced, &to) else { return };
        match xattr::set(&at, xattr::LABEL, &label) {
            Ok(()) => done.changed += 1,
            Err(Errno::NOENT) => {}
            Err(error) => done.failed.push(format!("{path}: {error}")),
        }
    }

    /// Returns true if `current` is a default type of `path`, and no program could set the type `to` under the old
    /// policy.
    fn is_default(&self, current: &str, path: &str, to: &str) -> bool {
        let Some(unlabelled) = self.unlabelled.filter(|_| !self.assigned.contains(to)) else { return false };
        let is_of_directory = |side: &Side<'_>| {
            let directory = path.rsplit_once('/').map(|(directory, _)| directory);
            directory.and_then(|directory| side.assigned_type(directory, 0o040_000)).is_some_and(|kind| kind == current)
        };
        current != to && (current == unlabelled || is_of_directory(&self.from) || is_of_directory(&self.to))
    }
}

/// Returns `label` with the type `to`, or `None` if `is_replaced` is false for its type. Keeps user, role and level, as
/// restorecon(8) does.
fn with_type(label: &[u8], is_replaced: impl Fn(&str) -> bool, to: &str) -> Option<Vec<u8>> {
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
    fn only_the_replaced_type_of_a_label_changes() {
        let after = |label: &str| {
            with_type(label.as_bytes(), |current| current == "old_t", "new_t")
                .map(|label| String::from_utf8(label).unwrap())
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
    fn a_directory_gets_the_label_of_its_line() {
        let scratch = tempfile::tempdir().unwrap();
        put(scratch.path(), "config", "SELINUXTYPE=targeted\n");
        put(
            scratch.path(),
            "targeted/contexts/files/file_contexts",
            "/run/a -- file\n/run/a -d dir\n/run/b <<none>>\n",
        );
        let contexts = FileContexts::read(&[scratch.path()]).unwrap();
        let label = |path: &str| contexts.of_directory(Path::new(path));
        assert_eq!([label("/run/a"), label("/run/b"), label("/c")], [Some("dir".to_owned()), None, None]);
    }

    #[test]
    fn earlier_layers_hide_the_files_of_later_ones() {
        let scratch = tempfile::tempdir().unwrap();
        let (upper, lower) = (scratch.path().join("upper"), scratch.path().join("lower"));
        let files = "targeted/contexts/files/file_contexts";
        put(&lower, "config", "SELINUXTYPE=targeted\n");
        put(&lower, files, "/a -- old\n");
        put(&lower, &format!("{files}.subs_dist"), "/b /c\n");
        put(&lower, &format!("{files}.local"), "/l -- l\n");
        put(&upper, files, "/a -- new\n");
        // Stands for a whiteout of an overlay.
        std::os::unix::fs::symlink("/dev/null", upper.join(format!("{files}.local"))).unwrap();
        let FileContexts(texts) = FileContexts::read(&[&upper, &lower]).unwrap();
        assert_eq!(texts.contexts, ["/a -- new\n".to_owned(), String::new(), String::new()]);
        assert_eq!(texts.substitutions, [String::new(), "/b /c\n".to_owned()]);
        let FileContexts(texts) = FileContexts::read(&[&lower]).unwrap();
        assert_eq!(texts.contexts[2], "/l -- l\n");
        assert_eq!(FileContexts::read(&[&scratch.path().join("none")]).unwrap(), FileContexts::default());
    }

    /// Runs on an overlay, like `/etc` on live media. Needs a kernel without SELinux, which stores any label.
    const RUN: &str = "RUN(/.*)? system_u:object_r:run_t:s0\n";

    /// An overlay at `run`, as on live media, with entries of several labels and a mount.
    struct Bed<'a> {
        scratch: &'a Path,
        run: PathBuf,
    }

    impl Bed<'_> {
        /// Calls `test` in a private mount namespace. Does nothing under SELinux.
        fn with(test: impl FnOnce(&Bed<'_>) + Send) {
            if crate::mode() == crate::Mode::Disabled {
                support::testing::private(|scratch| test(&Bed::new(scratch)));
            }
        }

        fn new(scratch: &Path) -> Bed<'_> {
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
            Bed { scratch, run }
        }

        /// Returns the contexts of these lines, in which `RUN` stands for the overlay.
        fn contexts(&self, lines: &str) -> FileContexts {
            let contexts = [lines.replace("RUN", self.run.to_str().unwrap()), String::new(), String::new()];
            FileContexts(Texts { contexts, ..Texts::default() })
        }

        /// Returns the number of entries that a relabelling from `old` to `new` changes.
        fn relabel(&self, old: &FileContexts, new: &FileContexts, with: Option<&str>) -> usize {
            let directories = [&*self.run, Path::new("/nonexistent")];
            let Relabelled { changed, failed } = old.relabel(new, &directories, with, self.scratch).unwrap();
            assert_eq!(failed, [""; 0]);
            changed
        }

        fn types(&self) -> [String; 6] {
            ["app", "app/sock", "app/link", "app/own", "app/mounted", "same"].map(|path| {
                let label = xattr::get(&self.run.join(path), xattr::LABEL).unwrap().unwrap();
                type_of(&String::from_utf8(label).unwrap()).unwrap().to_owned()
            })
        }
    }

    fn label(path: &Path, of: &str) {
        xattr::set(path, xattr::LABEL, format!("system_u:object_r:{of}:s0\0").as_bytes()).unwrap();
    }

    #[test]
    fn entries_with_the_label_of_the_old_policy_get_that_of_the_new_one() {
        Bed::with(|bed| {
            let old = bed.contexts(RUN);
            let new = bed.contexts(&format!("{RUN}RUN/app(/.*)? system_u:object_r:app_t:s0\n"));
            let tmpfs = Some("system_u:object_r:tmpfs_t:s0");
            assert_eq!(bed.relabel(&old, &old, tmpfs), 0);
            assert_eq!(bed.relabel(&old, &new, tmpfs), 3);
            assert_eq!(bed.types(), ["app_t", "app_t", "app_t", "container_file_t", "run_t", "run_t"]);
            // A second run changes nothing, and the reverse restores the old labels.
            assert_eq!(bed.relabel(&old, &new, tmpfs), 0);
            assert_eq!(bed.relabel(&new, &old, None), 3);
            assert_eq!(bed.types(), ["run_t", "run_t", "run_t", "container_file_t", "run_t", "run_t"]);
        });
    }

    #[test]
    fn unusual_lines_are_left_to_libselinux() {
        Bed::with(|bed| {
            let old = bed.contexts(RUN);
            let lines = format!("/ root:object_r:root_t:s0\n{RUN}RUN/ap[p]|/odd system_u:object_r:odd_t:s0\n");
            let unusual = bed.contexts(&lines);
            assert_eq!(bed.relabel(&old, &unusual, None), 3);
            assert_eq!(bed.types(), ["odd_t", "odd_t", "odd_t", "container_file_t", "run_t", "run_t"]);
            assert_eq!(bed.relabel(&unusual, &old, None), 3);
            // If libselinux refuses a line, no entry is relabelled.
            let refused = bed.contexts("/é system_u:object_r:x_t:s0\n");
            assert!(old.relabel(&refused, &[&*bed.run], None, bed.scratch).is_err());
        });
    }

    #[test]
    fn entries_with_the_type_of_their_file_system_or_directory_get_the_new_label() {
        Bed::with(|bed| {
            let with_app = |text: &str| bed.contexts(&format!("{RUN}RUN/app/.* {text}\n"));
            let old = with_app("system_u:object_r:sock_t:s0");
            let tmpfs = Some("system_u:object_r:tmpfs_t:s0");
            label(&bed.run.join("app/sock"), "tmpfs_t");
            for (to, with, expected) in [
                ("system_u:object_r:new_t:s0", None, ["run_t", "tmpfs_t", "run_t", "container_file_t"]),
                ("system_u:object_r:run_t:s0", tmpfs, ["run_t", "tmpfs_t", "run_t", "container_file_t"]),
                ("system_u:object_r:new_t:s0", tmpfs, ["run_t", "new_t", "new_t", "container_file_t"]),
            ] {
                bed.relabel(&old, &with_app(to), with);
                assert_eq!(bed.types()[..4], expected, "{to} {with:?}");
            }
        });
    }
}
