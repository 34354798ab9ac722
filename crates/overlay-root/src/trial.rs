//! Runs programs of a tree that is not exposed yet.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string,
};

use super::DetachedTree;
use super::namespace::make_private;
use support::command::{Ended, Program};
use support::failpoint::{self, Point};
use support::xattr::{self, LABEL};

/// Time limit of a copy of `/etc`.
const COPY_TIMEOUT: Duration = Duration::from_secs(60);

/// A private view of the machine: the new tree is `/usr`, `/etc` is a writable copy, `/var` is empty.
/// Programs in it cannot change the running system's `/usr`, `/etc` and `/var`.
#[derive(Debug)]
pub struct Trial {
    /// Reason why the merge failed. Programs then see the running `/etc`, read-only.
    pub etc_unmerged: Option<String>,
}

/// Runs `act` with a private mount namespace in which programs see `tree` as `/usr`. No other process sees the tree.
///
/// `/etc` is an overlay of the running one, or a copy if the kernel cannot stack another overlay. `merge_etc` is applied to
/// it first, with the directory and a scratch directory for its records. If this fails, [`Trial::etc_unmerged`] holds the
/// reason.
///
/// # Errors
/// The namespace cannot be made, and errors of `act`. The mounts outside of the namespace never change.
pub fn trial<T: Send>(
    tree: &DetachedTree,
    merge_etc: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync),
    act: impl FnOnce(&Trial) -> T + Send,
) -> Result<T> {
    failpoint::hit(Point::Trial, "").context("cannot start the trial run")?;
    let duplicate = tree.duplicate().context("cannot build a second tree for the trial run")?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let trial =
                isolate(&duplicate, merge_etc).context("cannot make a private mount namespace for the trial run")?;
            Ok(act(&trial))
        });
        thread.join().map_err(|_| anyhow!("internal error: the thread of the trial run panicked"))?
    })
}

/// Moves the calling thread to a private mount namespace with `tree` at `/usr`. The thread cannot return.
fn isolate(tree: &DetachedTree, merge_etc: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync)) -> Result<Trial> {
    make_private()?;
    // /var holds the overlay's upper layer, the records of the merge, and files that programs write, such as ldconfig's
    // second cache.
    let label = label_of("/var");
    rustix::mount::mount("trial", "/var", "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, Some(c"mode=0755"))
        .context("cannot mount an empty /var")?;
    set_label("/var", label.as_deref());
    let etc_unmerged = private_etc(merge_etc).err().map(|error| format!("{error:#}"));
    if etc_unmerged.is_some() {
        rustix::mount::mount_bind("/etc", "/etc")
            .and_then(|()| rustix::mount::mount_remount("/etc", MountFlags::BIND | MountFlags::RDONLY, ""))
            .context("cannot make /etc read-only")?;
    }
    rustix::mount::move_mount(tree.as_fd(), "", CWD, "/usr", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("cannot mount the new tree at /usr")?;
    Ok(Trial { etc_unmerged })
}

/// Makes an overlay or a copy of `/etc`, merges it, and mounts it at `/etc`.
fn private_etc(merge: &(dyn Fn(BorrowedFd<'_>, &Path) -> Result<()> + Sync)) -> Result<()> {
    let records = Path::new("/var/records");
    for directory in [Path::new("/var/upper"), Path::new("/var/work"), records] {
        std::fs::create_dir(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    // The overlay's root has the label of its upper layer.
    set_label("/var/upper", label_of("/etc").as_deref());
    let view = match overlay_of_etc() {
        // A transient /etc is an overlay already, so the kernel may refuse another one.
        Err(Errno::INVAL) => copy_of_etc().context("cannot copy /etc")?,
        other => other.context("cannot make an overlay of /etc")?,
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(&view, ".", flags, Mode::empty()).context("cannot open the copy of /etc")?;
    failpoint::suspended(|| merge(root.as_fd(), records)).context("cannot merge /etc")?;
    rustix::mount::move_mount(&view, "", CWD, "/etc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("cannot mount the copy of /etc")
}

/// Returns a tmpfs with a copy of `/etc`, without mounts below it.
fn copy_of_etc() -> Result<OwnedFd> {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("fsopen(tmpfs)")?;
    fsconfig_set_string(&fs, "source", "trial").context("cannot set source")?;
    fsconfig_create(&fs).context("cannot create the tmpfs")?;
    let view = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
        .context("fsmount")?;
    let (from, to) = ("/etc/.", Path::new("/var/copy"));
    std::fs::create_dir(to).context("cannot create the mount point")?;
    rustix::mount::move_mount(&view, "", CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("cannot mount the tmpfs")?;
    // `-a` copies all attributes, including labels, and does not read sockets and device nodes.
    run(&["/usr/bin/cp", "-a", "-x", from, "/var/copy/"], COPY_TIMEOUT)?.success()?;
    Ok(view)
}

/// Returns the SELinux label of `path`, or `None` if it has none. Confined programs need the same labels in a trial.
fn label_of(path: &str) -> Option<Vec<u8>> {
    xattr::get(Path::new(path), LABEL).ok().flatten()
}

fn set_label(path: &str, label: Option<&[u8]>) {
    if let Some(label) = label {
        // After an error here, a confined program may fail and report the denied access.
        let _ = xattr::set(Path::new(path), LABEL, label);
    }
}

fn overlay_of_etc() -> rustix::io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in
        [("source", "trial"), ("lowerdir", "/etc"), ("upperdir", "/var/upper"), ("workdir", "/var/work")]
    {
        fsconfig_set_string(&fs, key, value)?;
    }
    fsconfig_create(&fs)?;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
}

impl Trial {
    /// Runs `argv`, which begins with an absolute path, and returns its result with any exit status.
    ///
    /// # Errors
    /// The program cannot be started (missing, a broken loader, a foreign architecture), or was killed after `limit`.
    pub fn run(&self, argv: &[&str], limit: Duration) -> Result<Ended> {
        let mut program = prepared(argv, limit);
        program.shown += " in the new /usr";
        program.end_blocking()
    }
}

/// Runs a program of the running system in the same way as [`Trial::run`], for comparison.
///
/// # Errors
/// Those of [`Trial::run`].
pub fn run(argv: &[&str], limit: Duration) -> Result<Ended> {
    prepared(argv, limit).end_blocking()
}

fn prepared(argv: &[&str], limit: Duration) -> Program<'static> {
    let mut program = Program::new(argv, limit);
    program.command.env_clear().env("PATH", "/usr/sbin:/usr/bin").env("LC_ALL", "C");
    program
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use anyhow::bail;
    use nix::sched::CloneFlags;

    use super::*;
    use crate::testing::here;
    use support::testing::private;

    #[test]
    fn a_program_of_the_tree_runs_without_effects_on_the_system() {
        private(|scratch| {
            let top = scratch.join("top");
            fs::create_dir_all(top.join("bin")).unwrap();
            fs::copy("/usr/bin/echo", top.join("bin/only-in-the-new-tree")).unwrap();
            fs::write(top.join("bin/not-a-program"), [0x7f, b'E', b'L', b'F', 0]).unwrap();
            fs::set_permissions(top.join("bin/not-a-program"), fs::Permissions::from_mode(0o755)).unwrap();
            let tree = DetachedTree::overlay(&[&top, Path::new("/usr")], "nip:test").unwrap();
            let before = here().mounts().unwrap();

            let limit = Duration::from_secs(120);
            let merge = |etc: BorrowedFd<'_>, records: &Path| -> Result<()> {
                assert!(records.is_dir());
                let flags = OFlags::WRONLY | OFlags::CREATE;
                File::from(rustix::fs::openat(etc, "trial", flags, Mode::RUSR)?).write_all(b"merged")?;
                rustix::fs::unlinkat(etc, "passwd", rustix::fs::AtFlags::empty())?;
                Ok(())
            };
            trial(&tree, &merge, |trial| {
                assert_eq!(trial.etc_unmerged, None);
                let ended = trial.run(&["/usr/bin/only-in-the-new-tree", "hello"], limit).unwrap();
                assert!(ended.status.success());
                assert_eq!(ended.stdout, b"hello\n");
                assert!(!trial.run(&["/usr/bin/false"], limit).unwrap().status.success());
                let error = trial.run(&["/usr/bin/not-a-program"], limit).unwrap_err();
                assert!(
                    format!("{error:#}").contains("cannot start /usr/bin/not-a-program in the new /usr"),
                    "{error:#}"
                );
                let started = Instant::now();
                let error = trial.run(&["/usr/bin/sleep", "600"], Duration::from_millis(100)).unwrap_err();
                assert!(format!("{error:#}").contains("stopped after"), "{error:#}");
                assert!(started.elapsed() < limit);
                // Files that a program writes stay in the private namespace.
                let script = "cat /etc/trial; ls /etc/passwd /var/lib; echo x >/etc/x; echo x >/var/x";
                let ended = trial.run(&["/usr/bin/sh", "-c", script], limit).unwrap();
                assert!(ended.status.success() && ended.stdout == b"merged", "{ended:?}");
            })
            .unwrap();
            for path in ["/etc/trial", "/etc/x", "/var/x"] {
                assert!(!Path::new(path).exists(), "{path}");
            }
            assert!(Path::new("/etc/passwd").exists());

            let fails = |_: BorrowedFd<'_>, _: &Path| -> Result<()> { bail!("no room") };
            trial(&tree, &fails, |trial| {
                assert!(trial.etc_unmerged.as_ref().unwrap().contains("no room"));
                let ended = trial.run(&["/usr/bin/sh", "-c", "cat /etc/passwd; ! echo x >/etc/x"], limit).unwrap();
                assert!(ended.status.success() && ended.stdout.starts_with(b"root:"), "{ended:?}");
            })
            .unwrap();

            assert_eq!(here().mounts().unwrap(), before);
            assert!(!Path::new("/usr/bin/only-in-the-new-tree").exists());
        });
    }

    /// A transient `/etc` on a composefs root, on which the kernel cannot stack another overlay.
    #[test]
    fn an_etc_without_support_for_another_overlay_is_copied() {
        private(|scratch| {
            let dir = |name: &str| {
                let path = scratch.join(name);
                fs::create_dir(&path).unwrap();
                path
            };
            let empty = dir("empty");
            for name in ["first", "second"] {
                let place = dir(name);
                DetachedTree::overlay(&[&empty, Path::new("/etc")], "nip:etc")
                    .unwrap()
                    .expose_in(&here(), &place)
                    .unwrap();
                rustix::mount::mount_bind(&place, "/etc").unwrap();
            }
            assert_eq!(overlay_of_etc_in_a_scratch_var(), Some(Errno::INVAL), "the kernel refuses another overlay");
            let merge = |etc: BorrowedFd<'_>, _: &Path| -> Result<()> {
                let flags = OFlags::WRONLY | OFlags::CREATE;
                File::from(rustix::fs::openat(etc, "trial", flags, Mode::RUSR)?).write_all(b"merged")?;
                Ok(())
            };
            let top = dir("top");
            let tree = DetachedTree::overlay(&[&top, Path::new("/usr")], "nip:test").unwrap();
            trial(&tree, &merge, |trial| {
                assert_eq!(trial.etc_unmerged, None);
                let script = "cat /etc/trial; stat -c %a /etc/shadow; test -s /etc/passwd";
                let ended = trial.run(&["/usr/bin/sh", "-c", script], Duration::from_secs(120)).unwrap();
                let mode = fs::metadata("/etc/shadow").unwrap().permissions().mode() & 0o7777;
                assert_eq!(
                    (ended.status.success(), ended.stdout),
                    (true, format!("merged{mode:o}\n").into_bytes()),
                    "{}",
                    ended.stderr
                );
            })
            .unwrap();
            assert!(!Path::new("/etc/trial").exists());
        });
    }

    fn overlay_of_etc_in_a_scratch_var() -> Option<Errno> {
        std::thread::scope(|scope| {
            let probe = || {
                nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
                rustix::mount::mount("probe", "/var", "tmpfs", MountFlags::empty(), None).unwrap();
                fs::create_dir("/var/upper").unwrap();
                fs::create_dir("/var/work").unwrap();
                overlay_of_etc().err()
            };
            scope.spawn(probe).join().unwrap()
        })
    }
}
