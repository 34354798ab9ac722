//! A mount tree that nobody sees yet.

use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string};

use super::Namespace;
use super::table::Exposure;
use support::failpoint::{self, Point};

/// The longest string that `fsconfig` takes, without its end.
const LONGEST_VALUE: usize = 255;

/// A read-only overlay that is complete but mounted nowhere. Dropping it releases it.
#[derive(Debug)]
pub struct DetachedTree {
    tree: OwnedFd,
    lowers: Vec<PathBuf>,
    source: String,
}

/// How the kernel is told the layers.
#[derive(Debug, Clone, Copy)]
enum Style {
    /// `lowerdir+`, once per layer: Linux 6.8 and later.
    Append,
    /// One `lowerdir` string.
    Joined,
}

impl DetachedTree {
    /// An overlay of `lowers`, topmost first, read-only and without device nodes; setuid programs work.
    /// `source` is what mount tables will call it, and what it is found by later.
    ///
    /// The layers must not change while the tree or anything exposed from it lives. A layer's own
    /// submounts are not part of it.
    ///
    /// # Errors
    /// When a layer cannot be opened, or the kernel refuses (no overlay, stacked too deep); its own
    /// words are in the message. Nothing is mounted then.
    pub fn overlay(lowers: &[&Path], source: &str) -> Result<Self> {
        // An old kernel refuses the key too, but writes a warning to its log each time.
        let appends = rustix::system::uname().release().to_str().is_ok_and(knows_append);
        match Self::build(lowers, source, if appends { Style::Append } else { Style::Joined }) {
            // A kernel that is less than its number says.
            Err(error) if appends && is_invalid(&error) => Self::build(lowers, source, Style::Joined),
            other => other,
        }
    }

    fn build(lowers: &[&Path], source: &str, style: Style) -> Result<Self> {
        failpoint::hit(Point::Overlay, "").context("putting the overlay together")?;
        ensure!(lowers.len() > 1, "an overlay without an upper layer needs two lower ones");
        let layers = lowers.iter().map(|path| Layer::open(path)).collect::<Result<Vec<_>>>()?;
        let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
            .context("this kernel has no overlay file system; nothing was mounted")?;
        let described = |step: &str| format!("overlay of {}: {step}{}", list(lowers), kernel_words(&fs));
        fsconfig_set_string(&fs, "source", source).with_context(|| described("setting its source"))?;
        match style {
            Style::Append => {
                for layer in &layers {
                    let name = layer.plain_name(LONGEST_VALUE);
                    fsconfig_set_string(&fs, "lowerdir+", name).with_context(|| described("adding a layer"))?;
                }
            }
            Style::Joined => {
                fsconfig_set_string(&fs, "lowerdir", joined(&layers))
                    .with_context(|| described("setting its layers"))?;
            }
        }
        fsconfig_create(&fs).with_context(|| described("creating it"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        let tree = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .with_context(|| described("making a mount of it"))?;
        Ok(Self { tree, lowers: lowers.iter().map(|path| path.to_path_buf()).collect(), source: source.to_owned() })
    }

    /// The tree's root directory, to look inside by `openat2`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.tree.as_fd()
    }

    /// What mount tables call it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// A second mount of the same layers. Kernels before 6.15 cannot clone a detached tree, so this
    /// builds it anew: the layers' paths must still lead to the same directories.
    pub fn twin(&self) -> Result<Self> {
        Self::overlay(&self.lowers.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &self.source)
    }

    /// Makes the tree appear at `target` in PID 1's mount namespace. See [`Self::expose_in`].
    pub fn expose(self, target: &Path) -> Result<()> {
        self.expose_in(&Namespace::init(), target)
    }

    /// Makes the tree appear at `target` in `namespace`, in one step (`move_mount`): a lookup finds
    /// the old directory or the whole new tree, never anything else. What was there is covered, not
    /// removed; [`Namespace::withdraw`] brings it back.
    ///
    /// # Errors
    /// Refuses when a mount of this source is there already. On any error before the step nothing
    /// has changed; the one check after it says so when it fails.
    pub fn expose_in(self, namespace: &Namespace, target: &Path) -> Result<()> {
        let place = target.display();
        if namespace.exposure(target, &self.source)? != Exposure::Absent {
            bail!("{} is mounted at {place} already; nothing was done", self.source);
        }
        let expected = rustix::fs::fstat(&self.tree).context("looking at the new tree")?.st_dev;
        namespace.run(|| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = rustix::fs::open(target, flags, Mode::empty())
                .with_context(|| format!("opening {place}: nothing was changed"))?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            failpoint::hit(Point::Expose, "")
                .and_then(|()| Ok(rustix::mount::move_mount(&self.tree, "", &directory, "", flags)?))
                .with_context(|| format!("mounting {} at {place}: nothing was changed", self.source))?;
            let seen = failpoint::hit(Point::Exposed, "")
                .and_then(|()| Ok(rustix::fs::statat(CWD, target, AtFlags::SYMLINK_NOFOLLOW)?))
                .with_context(|| format!("looking at {place} after mounting {}", self.source))?
                .st_dev;
            ensure!(
                seen == expected,
                "{} is mounted at {place}, but something else covers it; undo takes it away",
                self.source
            );
            Ok(())
        })
    }
}

/// Whether this kernel has, or can load, the overlay file system.
///
/// # Errors
/// The kernel's own: `ENODEV` when it has none, `ENOSYS` before Linux 5.2, `EPERM` without CAP_SYS_ADMIN.
pub fn overlay_support() -> rustix::io::Result<()> {
    rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)
}

/// Tries whether the kernel lays an overlay over `path`. It is never mounted anywhere.
///
/// # Errors
/// The kernel's words when it refuses: stacked too deep, or a file system that cannot be a layer.
pub fn overlay_fits(path: &Path) -> Result<()> {
    // Any directory of another file system will do as the other layer; this one is always there.
    DetachedTree::overlay(&[path, Path::new("/run")], "probe").map(drop)
}

/// A layer's directory, held open so that a name through `/proc/self/fd` leads to it.
struct Layer {
    path: PathBuf,
    directory: OwnedFd,
}

impl Layer {
    fn open(path: &Path) -> Result<Self> {
        ensure!(path.is_absolute(), "the overlay layer {} must be an absolute path", path.display());
        let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("opening the overlay layer {}", path.display()))?;
        Ok(Self { path: path.to_owned(), directory })
    }

    /// A name of at most `longest` bytes. The path where it fits, because mount tables show it.
    fn plain_name(&self, longest: usize) -> PathBuf {
        if self.path.as_os_str().len() <= longest {
            return self.path.clone();
        }
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()))
    }

    /// A name without the characters that mean something in a `lowerdir` string. (They could be
    /// escaped, except for the comma, which old kernels refuse in any form.)
    fn quiet_name(&self, short: bool) -> String {
        match self.path.to_str() {
            Some(path) if !short && !path.contains([':', '\\', ',']) => path.to_owned(),
            _ => format!("/proc/self/fd/{}", self.directory.as_raw_fd()),
        }
    }
}

/// Whether a kernel of this release (`6.8.0-45-generic`) knows `lowerdir+`.
fn knows_append(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|digits| digits.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 8)
}

fn joined(layers: &[Layer]) -> String {
    let join = |short| layers.iter().map(|layer| layer.quiet_name(short)).collect::<Vec<_>>().join(":");
    let long = join(false);
    if long.len() <= LONGEST_VALUE { long } else { join(true) }
}

fn is_invalid(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Errno>().is_some_and(|errno| *errno == Errno::INVAL)
}

fn list(paths: &[&Path]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" over ")
}

/// What the kernel wrote to the file system context's log, for the end of a message.
fn kernel_words(fs: &OwnedFd) -> String {
    let mut words = String::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(fs, &mut buffer) {
        let _ = write!(words, "; kernel: {}", String::from_utf8_lossy(&buffer[..length]).trim());
    }
    words
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use rustix::fs::{FileType, openat};

    use super::*;
    use crate::testing::here;
    use support::testing::private;

    #[test]
    fn kernel_releases() {
        for (release, expected) in [
            ("6.1.0-50-cloud-amd64", false),
            ("5.14.0-503.el9.x86_64", false),
            ("6.8.0", true),
            ("6.12.43+deb13", true),
            ("7.0-rc1", true),
            ("x", false),
        ] {
            assert_eq!(knows_append(release), expected, "{release}");
        }
    }

    fn layers(root: &Path) -> (PathBuf, PathBuf) {
        let (top, bottom) = (root.join("top"), root.join("bottom"));
        fs::create_dir(&top).unwrap();
        fs::create_dir(&bottom).unwrap();
        fs::write(top.join("new"), "n").unwrap();
        fs::write(bottom.join("old"), "o").unwrap();
        fs::write(bottom.join("gone"), "g").unwrap();
        rustix::fs::mknodat(CWD, top.join("gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        (top, bottom)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_tree_is_looked_into_exposed_and_withdrawn() {
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let target = scratch.join("usr");
            fs::create_dir(&target).unwrap();
            fs::write(target.join("before"), "").unwrap();
            let tree = DetachedTree::overlay(&[&top, &bottom], "nip:test").unwrap();
            assert!(openat(tree.as_fd(), "new", OFlags::RDONLY, Mode::empty()).is_ok());
            assert_eq!(openat(tree.as_fd(), "gone", OFlags::RDONLY, Mode::empty()).unwrap_err(), Errno::NOENT);
            assert_eq!(names(&target), ["before"]);

            let twin = tree.twin().unwrap();
            tree.expose_in(&here(), &target).unwrap();
            assert_eq!(names(&target), ["new", "old"]);
            assert_eq!(here().exposure(&target, "nip:test").unwrap(), Exposure::OnTop);
            assert!(fs::write(target.join("x"), "").is_err(), "it is read-only");
            assert!(twin.expose_in(&here(), &target).is_err(), "not twice");

            assert!(!here().withdraw(&target, "somebody else's").unwrap());
            assert!(here().withdraw(&target, "nip:test").unwrap());
            assert!(!here().withdraw(&target, "nip:test").unwrap());
            assert_eq!(names(&target), ["before"]);
        });
    }

    #[test]
    fn a_sandboxed_caller_exposes_to_the_outside_and_to_everybody_below_it() {
        use nix::sched::CloneFlags;
        use rustix::mount::{MountPropagationFlags, mount_change};
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let target = scratch.join("usr");
            fs::create_dir(&target).unwrap();
            // PID 1's tree is shared, and a sandboxed service's is a slave of it.
            mount_change(scratch, MountPropagationFlags::SHARED).unwrap();
            let outside = here();
            let sandboxed = |act: &(dyn Fn() + Sync)| {
                std::thread::scope(|scope| {
                    let thread = scope.spawn(|| {
                        nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
                        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
                        act();
                    });
                    thread.join().unwrap();
                });
            };
            sandboxed(&|| {
                let tree = DetachedTree::overlay(&[&top, &bottom], "nip:test").unwrap();
                tree.expose_in(&outside, &target).unwrap();
                assert_eq!(names(&target), ["new", "old"], "it came down to us");
            });
            assert_eq!(names(&target), ["new", "old"]);
            sandboxed(&|| {
                assert!(outside.withdraw(&target, "nip:test").unwrap());
                assert_eq!(names(&target), [""; 0]);
            });
            assert_eq!(names(&target), [""; 0]);
        });
    }

    #[test]
    fn a_covered_mount_is_not_withdrawn() {
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let target = scratch.join("usr");
            fs::create_dir(&target).unwrap();
            DetachedTree::overlay(&[&top, &bottom], "nip:test").unwrap().expose_in(&here(), &target).unwrap();
            rustix::mount::mount("other", &target, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
            assert_eq!(here().exposure(&target, "nip:test").unwrap(), Exposure::Covered);
            let refusal = here().withdraw(&target, "nip:test").unwrap_err().to_string();
            assert!(refusal.contains("other"), "{refusal}");
        });
    }

    #[test]
    fn the_old_spelling_of_layers_works_with_awkward_paths() {
        private(|scratch| {
            let long = scratch.join("long").join("x".repeat(200)).join("y".repeat(100));
            for dir in [scratch.join("a:b"), scratch.join("a,b"), scratch.join("a\\b"), long] {
                fs::create_dir_all(&dir).unwrap();
                let (top, bottom) = layers(&dir);
                for style in [Style::Joined, Style::Append] {
                    let tree = DetachedTree::build(&[&top, &bottom], "nip:test", style).unwrap();
                    assert!(openat(tree.as_fd(), "old", OFlags::RDONLY, Mode::empty()).is_ok(), "{dir:?} {style:?}");
                }
            }
        });
    }

    #[test]
    fn what_the_kernel_refuses_is_said() {
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let mut below = bottom;
            for level in 0..2 {
                let place = scratch.join(format!("level{level}"));
                fs::create_dir(&place).unwrap();
                DetachedTree::overlay(&[&top, &below], "nip:test").unwrap().expose_in(&here(), &place).unwrap();
                below = place;
            }
            let error = format!("{:#}", DetachedTree::overlay(&[&top, &below], "nip:test").unwrap_err());
            assert!(error.contains("level1") && error.contains("Invalid argument"), "{error}");
            assert_eq!(super::super::overlay_stack(&here().mounts().unwrap(), &below).len(), 2);
            let error = DetachedTree::overlay(&[&top, &scratch.join("none")], "nip:test").unwrap_err();
            assert!(format!("{error:#}").contains("none"));
        });
    }
}
