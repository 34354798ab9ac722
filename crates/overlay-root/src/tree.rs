//! A detached mount tree.

use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string};

use super::Namespace;
use super::bound::Bound;
use super::image::{Composefs, PLACE};
use super::namespace::privately;
use super::table::Exposure;
use support::failpoint::{self, Point};

/// Longest string that fsconfig(2) accepts, without the final NUL.
const LONGEST_VALUE: usize = 255;

/// A read-only mount tree that is not attached to any path. Dropping it releases it.
#[derive(Debug)]
pub struct DetachedTree {
    tree: OwnedFd,
    recipe: Recipe,
    source: String,
}

/// The parts of a detached tree.
#[derive(Debug, Clone)]
pub(crate) enum Recipe {
    /// An overlay of layers.
    Overlay(Layers),
    /// A directory.
    Bound(Bound),
}

/// The layers of an overlay.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    /// Directories, topmost first.
    pub(crate) directories: Vec<PathBuf>,
    /// The image whose `/usr` is the lowest layer.
    pub(crate) image: Option<Composefs>,
}

/// Syntax in which the kernel gets the layers.
#[derive(Debug, Clone, Copy)]
enum Style {
    /// `lowerdir+` for each layer: Linux 6.8 and later.
    Append,
    /// One string `lowerdir` with all layers.
    Joined,
}

impl DetachedTree {
    /// Builds an overlay of `lowers`, topmost first. It is read-only and without device nodes; setuid programs work.
    /// `source` is its name in mount tables, by which other functions find it.
    ///
    /// The layers must not change while the tree or a mount of it exists. Mounts below a layer are not part of the tree.
    ///
    /// # Errors
    /// A layer cannot be opened, or the kernel refuses (no overlay file system, or too many stacked overlays). The message
    /// contains the kernel's text.
    pub fn overlay(lowers: &[&Path], source: &str) -> Result<Self> {
        let directories = lowers.iter().map(|path| path.to_path_buf()).collect();
        Self::of(Recipe::Overlay(Layers { directories, image: None }), source)
    }

    pub(crate) fn of(recipe: Recipe, source: &str) -> Result<Self> {
        failpoint::hit(Point::Overlay, "").context("cannot build the new /usr")?;
        let tree = match &recipe {
            Recipe::Overlay(layers) => overlay(layers, source)?,
            Recipe::Bound(bound) => bound.open()?,
        };
        Ok(Self { tree, recipe, source: source.to_owned() })
    }

    /// Returns the tree's root directory, for lookups with openat2(2).
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.tree.as_fd()
    }

    /// Returns the name in mount tables.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Builds a second tree of the same parts, because kernels before 6.15 cannot clone a detached tree. The paths of the
    /// parts must still lead to the same directories.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        Self::of(self.recipe.clone(), &self.source)
    }

    /// Mounts the tree at `target` in PID 1's mount namespace. See [`Self::expose_in`].
    pub fn expose(self, target: &Path) -> Result<()> {
        self.expose_in(&Namespace::init(), target)
    }

    /// Mounts the tree at `target` in `namespace` in one step (move_mount(2)): a lookup finds either the old directory or
    /// the complete new tree. The old directory is covered, and [`Namespace::withdraw`] makes it visible again.
    ///
    /// # Errors
    /// A mount of this name is at `target` already, or the kernel refuses: nothing is mounted. If the check after the mount
    /// fails, the tree is mounted; the message says so.
    pub fn expose_in(self, namespace: &Namespace, target: &Path) -> Result<()> {
        let place = target.display();
        if namespace.exposure(target, &self.source)? != Exposure::Absent {
            bail!("cannot mount {} at {place}: it is mounted already", self.source);
        }
        let expected = rustix::fs::fstat(&self.tree).context("cannot read the device number of the new tree")?.st_dev;
        namespace.run(|| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory =
                rustix::fs::open(target, flags, Mode::empty()).with_context(|| format!("cannot open {place}"))?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            failpoint::hit(Point::Expose, "")
                .and_then(|()| Ok(rustix::mount::move_mount(&self.tree, "", &directory, "", flags)?))
                .with_context(|| format!("cannot mount {} at {place}", self.source))?;
            let seen = failpoint::hit(Point::Exposed, "")
                .and_then(|()| Ok(rustix::fs::statat(CWD, target, AtFlags::SYMLINK_NOFOLLOW)?))
                .with_context(|| format!("mounted {} at {place}, but cannot check {place}", self.source))?
                .st_dev;
            ensure!(seen == expected, "mounted {} at {place}, but another mount covers it", self.source);
            Ok(())
        })
    }
}

/// Checks that this kernel has, or can load, the overlay file system.
///
/// # Errors
/// `ENODEV` without the file system, `ENOSYS` before Linux 5.2, `EPERM` without CAP_SYS_ADMIN.
pub fn overlay_support() -> rustix::io::Result<()> {
    rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)
}

/// Builds a detached overlay.
fn overlay(layers: &Layers, source: &str) -> Result<OwnedFd> {
    // An old kernel refuses an unknown key, but also writes a warning to its log.
    let appends = rustix::system::uname().release().to_str().is_ok_and(knows_append);
    let (first, second) = if appends { (Style::Append, Style::Joined) } else { (Style::Joined, Style::Append) };
    // Distributions port features back, so the release number is only a hint.
    let has_second = appends || layers.image.is_some();
    match build(layers, source, first) {
        Err(error) if has_second && is_invalid(&error) => build(layers, source, second),
        other => other,
    }
}

fn build(layers: &Layers, source: &str, style: Style) -> Result<OwnedFd> {
    let open = || layers.directories.iter().map(|path| Layer::open(path)).collect::<Result<Vec<_>>>();
    match &layers.image {
        None => create(layers, &open()?, None, source, style),
        // Most kernels accept only directories of the caller's namespace as layers, and no other process needs the image.
        Some(image) => privately(|| {
            let mut lowers = open()?;
            let mut objects = Layer::open(&image.objects)?;
            let usr = image.open_usr()?;
            // Their paths lead to the image from here on.
            for layer in lowers.iter_mut().chain([&mut objects]) {
                layer.path.take_if(|path| path.starts_with(PLACE));
            }
            lowers.push(Layer { path: None, directory: usr });
            create(layers, &lowers, Some(&objects), source, style)
        }),
    }
}

/// Creates an overlay of open layers. `data` is a layer of which only the content of files is used, and true if the kernel
/// must compare that content with the digests in the other layers.
fn create(shown: &Layers, lowers: &[Layer], data: Option<&Layer>, source: &str, style: Style) -> Result<OwnedFd> {
    ensure!(lowers.len() > 1, "internal error: an overlay without an upper layer needs two lower layers");
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .context("cannot build the overlay: this kernel has no overlay file system")?;
    let failed = |step: &str| format!("cannot build the overlay {shown}: {step}{}", kernel_log(&fs));
    let set = |key: &str, value: &Path, step| fsconfig_set_string(&fs, key, value).with_context(|| failed(step));
    set("source", Path::new(source), "setting source")?;
    if data.is_some() {
        set("redirect_dir", Path::new("on"), "following redirects")?;
        set("metacopy", Path::new("on"), "separating data from metadata")?;
    }
    match style {
        Style::Append => {
            for layer in lowers {
                set("lowerdir+", &layer.plain_name(LONGEST_VALUE), "adding a layer")?;
            }
            if let Some(objects) = data {
                set("datadir+", &objects.plain_name(LONGEST_VALUE), "adding the layer with the data")?;
            }
        }
        Style::Joined => {
            set("lowerdir", joined(lowers, data).as_ref(), "setting the layers")?;
        }
    }
    fsconfig_create(&fs).with_context(|| failed("creating the file system"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).with_context(|| failed("creating the mount"))
}

/// The open directory of a layer, so that a path in `/proc/self/fd` leads to it.
struct Layer {
    /// Absent if only the caller's thread sees the directory at its path.
    path: Option<PathBuf>,
    directory: OwnedFd,
}

impl Layer {
    fn open(path: &Path) -> Result<Self> {
        ensure!(path.is_absolute(), "cannot use the overlay layer {}: expected an absolute path", path.display());
        let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("cannot open the overlay layer {}", path.display()))?;
        Ok(Self { path: Some(path.to_owned()), directory })
    }

    /// Returns a name of at most `longest` bytes. Prefers the path, because mount tables show it.
    fn plain_name(&self, longest: usize) -> PathBuf {
        let short = self.path.clone().filter(|path| path.as_os_str().len() <= longest);
        short.unwrap_or_else(|| PathBuf::from(self.link()))
    }

    /// Returns a name without the special characters of a `lowerdir` string. They could be escaped, except the comma,
    /// which old kernels refuse in any form.
    fn lowerdir_name(&self, short: bool) -> String {
        match self.path.as_deref().and_then(Path::to_str) {
            Some(path) if !short && !path.contains([':', '\\', ',']) => path.to_owned(),
            _ => self.link(),
        }
    }

    fn link(&self) -> String {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd())
    }
}

/// Returns true if a kernel of this release (such as `6.8.0-45-generic`) supports `lowerdir+`.
fn knows_append(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|digits| digits.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 8)
}

fn joined(lowers: &[Layer], data: Option<&Layer>) -> String {
    let join = |short| {
        let names = lowers.iter().map(|layer| layer.lowerdir_name(short)).collect::<Vec<_>>().join(":");
        data.map_or_else(|| names.clone(), |data| format!("{names}::{}", data.lowerdir_name(short)))
    };
    let long = join(false);
    if long.len() <= LONGEST_VALUE { long } else { join(true) }
}

fn is_invalid(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Errno>().is_some_and(|errno| *errno == Errno::INVAL)
}

impl std::fmt::Display for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut names: Vec<_> = self.directories.iter().map(|path| path.display().to_string()).collect();
        names.extend(self.image.as_ref().map(|image| format!("/usr of {}", image.path.display())));
        f.write_str(&names.join(" over "))
    }
}

/// Returns the kernel's log of the file system context, for the end of a message.
fn kernel_log(fs: &OwnedFd) -> String {
    let mut log = String::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(fs, &mut buffer) {
        let _ = write!(log, "; kernel: {}", String::from_utf8_lossy(&buffer[..length]).trim());
    }
    log
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
    fn only_newer_kernels_get_the_append_syntax() {
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
    fn a_tree_is_opened_exposed_and_withdrawn() {
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let target = scratch.join("usr");
            fs::create_dir(&target).unwrap();
            fs::write(target.join("before"), "").unwrap();
            let tree = DetachedTree::overlay(&[&top, &bottom], "nip:test").unwrap();
            assert!(openat(tree.as_fd(), "new", OFlags::RDONLY, Mode::empty()).is_ok());
            assert_eq!(openat(tree.as_fd(), "gone", OFlags::RDONLY, Mode::empty()).unwrap_err(), Errno::NOENT);
            assert_eq!(names(&target), ["before"]);

            let duplicate = tree.duplicate().unwrap();
            tree.expose_in(&here(), &target).unwrap();
            assert_eq!(names(&target), ["new", "old"]);
            assert_eq!(here().exposure(&target, "nip:test").unwrap(), Exposure::OnTop);
            assert!(fs::write(target.join("x"), "").is_err(), "read-only");
            assert!(duplicate.expose_in(&here(), &target).is_err(), "mounted already");

            assert!(!here().withdraw(&target, "other").unwrap());
            assert!(here().withdraw(&target, "nip:test").unwrap());
            assert!(!here().withdraw(&target, "nip:test").unwrap());
            assert_eq!(names(&target), ["before"]);
        });
    }

    #[test]
    fn a_sandboxed_caller_exposes_to_its_parent_namespace_and_its_slaves() {
        use nix::sched::CloneFlags;
        use rustix::mount::{MountPropagationFlags, mount_change};
        private(|scratch| {
            let (top, bottom) = layers(scratch);
            let target = scratch.join("usr");
            fs::create_dir(&target).unwrap();
            // PID 1's mounts are shared, and those of a sandboxed service are slaves of them.
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
                assert_eq!(names(&target), ["new", "old"], "propagated to the slave");
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
    fn both_syntaxes_work_with_long_paths_and_special_characters() {
        private(|scratch| {
            let long = scratch.join("long").join("x".repeat(200)).join("y".repeat(100));
            for dir in [scratch.join("a:b"), scratch.join("a,b"), scratch.join("a\\b"), long] {
                fs::create_dir_all(&dir).unwrap();
                let (top, bottom) = layers(&dir);
                for style in [Style::Joined, Style::Append] {
                    let layers = Layers { directories: vec![top.clone(), bottom.clone()], image: None };
                    let tree = build(&layers, "nip:test", style).unwrap();
                    assert!(openat(&tree, "old", OFlags::RDONLY, Mode::empty()).is_ok(), "{dir:?} {style:?}");
                }
            }
        });
    }

    #[test]
    fn errors_contain_the_layers_and_the_kernels_text() {
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
