//! Running a program of a tree that is not exposed yet.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::fs::{CWD, MemfdFlags};
use rustix::mount::{MountPropagationFlags, MoveMountFlags};

use super::DetachedTree;

/// How a program of the new tree ended.
#[derive(Debug)]
pub struct Trial {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// Runs `argv` with `tree` as `/usr` in a private mount namespace: nobody else sees the tree, and the
/// running system keeps its own. Returns how the program ended, whatever its exit status.
///
/// # Errors
/// When the namespace cannot be made, the program cannot be started (missing, a broken loader, a
/// foreign architecture), or it runs for longer than `timeout`: then it is killed. Nothing outside
/// the private namespace is touched in any case.
pub fn trial(tree: &DetachedTree, argv: &[&str], timeout: Duration) -> Result<Trial> {
    trial_at(tree, Path::new("/usr"), argv, timeout)
}

fn trial_at(tree: &DetachedTree, target: &Path, argv: &[&str], timeout: Duration) -> Result<Trial> {
    let twin = tree.twin().context("building a second tree for the trial run")?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            isolate(&twin, target).context("making a private mount namespace for the trial run")?;
            run(argv, timeout).with_context(|| format!("trial run of {} in the new /usr", argv.join(" ")))
        });
        thread.join().map_err(|_| anyhow!("the trial run's thread panicked"))?
    })
}

/// Gives the calling, short-lived thread a mount namespace of its own, with `tree` at `target`.
fn isolate(tree: &DetachedTree, target: &Path) -> Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).context("unshare")?;
    // Before anything else: what is mounted from here on must not spread.
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("keeping mounts to ourselves")?;
    rustix::mount::move_mount(tree.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .with_context(|| format!("mounting the new tree at {}", target.display()))
}

fn run(argv: &[&str], timeout: Duration) -> Result<Trial> {
    let (program, arguments) = argv.split_first().context("no program given")?;
    ensure!(program.starts_with('/'), "{program} must be an absolute path");
    // Files, not pipes: a child of the child that keeps them open cannot make us wait.
    let (mut stdout, mut stderr) = (memory_file("stdout")?, memory_file("stderr")?);
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()
        .context("it cannot be started")?;
    let end = Instant::now() + timeout;
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for it")? {
            break status;
        }
        if Instant::now() >= end {
            // The child leads a process group of its own, and is not reaped yet: the id is still its.
            if let Ok(group) = i32::try_from(child.id()) {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = child.wait();
            bail!("it did not end within {} s and was killed", timeout.as_secs_f32());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ok(Trial { status, stdout: text_of(&mut stdout)?, stderr: text_of(&mut stderr)? })
}

fn memory_file(name: &str) -> Result<File> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).context("memfd_create")?;
    Ok(File::from(fd))
}

fn text_of(file: &mut File) -> Result<String> {
    /// More than any `--version` prints.
    const LONGEST: u64 = 64 * 1024;
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::mount::testing::{here, private};

    #[test]
    fn a_program_of_the_tree_runs_and_nothing_spreads() {
        private(|scratch| {
            let top = scratch.join("top");
            fs::create_dir_all(top.join("bin")).unwrap();
            fs::copy("/usr/bin/echo", top.join("bin/only-in-the-new-tree")).unwrap();
            fs::write(top.join("bin/not-a-program"), [0x7f, b'E', b'L', b'F', 0]).unwrap();
            fs::set_permissions(top.join("bin/not-a-program"), fs::Permissions::from_mode(0o755)).unwrap();
            let tree = DetachedTree::overlay(&[&top, Path::new("/usr")], "nip:test").unwrap();
            let before = here().mounts().unwrap();

            let ten = Duration::from_secs(10);
            let trial_run = trial(&tree, &["/usr/bin/only-in-the-new-tree", "hello"], ten).unwrap();
            assert!(trial_run.status.success());
            assert_eq!(trial_run.stdout, "hello\n");
            assert!(!trial(&tree, &["/usr/bin/false"], ten).unwrap().status.success());
            let error = trial(&tree, &["/usr/bin/not-a-program"], ten).unwrap_err();
            assert!(format!("{error:#}").contains("cannot be started"), "{error:#}");
            let started = Instant::now();
            let error = trial(&tree, &["/usr/bin/sleep", "60"], Duration::from_millis(100)).unwrap_err();
            assert!(format!("{error:#}").contains("killed"), "{error:#}");
            assert!(started.elapsed() < ten);

            assert_eq!(here().mounts().unwrap(), before);
            assert!(!Path::new("/usr/bin/only-in-the-new-tree").exists());
        });
    }
}
