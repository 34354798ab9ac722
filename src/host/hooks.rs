//! Finds and runs hooks: executables of the administrator or of the node image that run before and after the switch.
//!
//! `docs/hooks.md` describes their directories and their environment. The caller decides about the consequences of a
//! failure.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;
use tracing::info;

use support::failpoint::{self, Point};

/// Directories with hooks, relative to the root. A name in an earlier one hides the same name in a later one.
const DIRECTORIES: [&str; 3] = ["etc", "run", "usr/lib"];
/// Time between SIGTERM and SIGKILL for a hook that exceeds its time limit.
const GRACE: Duration = Duration::from_secs(5);
/// Time to read remaining output after a hook has exited.
const DRAIN: Duration = Duration::from_secs(1);
/// Length in bytes at which a line of output is split.
const LONGEST_LINE: u64 = 2000;
/// Number of the last lines of output in the message of a failure.
const LAST_LINES: usize = 3;

/// The point of the pivot at which a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// After all checks, before the running system is changed.
    PreSwitch,
    /// After the refresh.
    PostSwitch,
}

impl Moment {
    /// Returns its name in paths and in the environment.
    pub fn as_str(self) -> &'static str {
        match self {
            Moment::PreSwitch => "pre-switch",
            Moment::PostSwitch => "post-switch",
        }
    }
}

/// A hook that will run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// Name in its directory.
    pub name: String,
    /// Path of the executable.
    pub path: PathBuf,
}

/// Returns the hooks of `moment` on the system below `root`, in the order in which they run.
///
/// # Errors
/// An existing directory cannot be read.
pub fn find(root: &Path, moment: Moment) -> Result<Vec<Hook>> {
    let mut listings = Vec::new();
    for directory in DIRECTORIES {
        let directory = root.join(directory).join("node-image-pivot").join(format!("{}.d", moment.as_str()));
        listings.push(list(&directory).with_context(|| format!("cannot read the hooks in {}", directory.display()))?);
    }
    Ok(choose(listings))
}

/// Lists the hooks of a directory, each with true if it is an executable file.
fn list(directory: &Path) -> Result<Vec<(Hook, bool)>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_hook_name(name)) else {
            continue;
        };
        // Follows links: a link to /dev/null disables a hook of this name in a later directory.
        let executable =
            std::fs::metadata(&path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
        found.push((Hook { name: name.to_owned(), path: path.clone() }, executable));
    }
    Ok(found)
}

/// Returns false for hidden files and for backup files of editors and package managers.
fn is_hook_name(name: &str) -> bool {
    const BACKUP: [&str; 9] =
        ["~", ".bak", ".orig", ".rpmnew", ".rpmsave", ".rpmorig", ".dpkg-new", ".dpkg-old", ".dpkg-dist"];
    !name.starts_with('.') && !BACKUP.iter().any(|end| name.ends_with(end))
}

/// Returns the executable hooks, sorted by name. The first listing that has a name decides.
fn choose(listings: Vec<Vec<(Hook, bool)>>) -> Vec<Hook> {
    let mut by_name = BTreeMap::new();
    for (hook, executable) in listings.into_iter().flatten() {
        by_name.entry(hook.name.clone()).or_insert((hook, executable));
    }
    by_name.into_values().filter_map(|(hook, executable)| executable.then_some(hook)).collect()
}

/// Runs `hook` until it exits, with `environment` added to the agent's. Logs each line of its output with its name. After
/// `limit`, its process group gets SIGTERM, and SIGKILL 5 s later. If this future is dropped, the group gets SIGKILL at
/// once.
///
/// # Errors
/// The hook did not start, did not exit within `limit`, or failed. The message has its last lines of output.
pub async fn run_hook(hook: &Hook, moment: Moment, environment: &[(&str, OsString)], limit: Duration) -> Result<()> {
    let shown = hook.path.display();
    failpoint::hit(Point::Tool, &hook.name).with_context(|| format!("the hook {shown}"))?;
    let mut child = Command::new(&hook.path)
        .envs(environment.iter().map(|(name, value)| (*name, value)))
        // A hook must not report readiness to systemd as the agent, nor read the agent's credentials.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("CREDENTIALS_DIRECTORY")
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start the hook {shown}"))?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id as i32)));
    let label = format!("{} hook {}", moment.as_str(), hook.name);
    let last = Arc::new(Mutex::new(VecDeque::new()));
    let mut output = JoinSet::new();
    if let Some(stream) = child.stdout.take() {
        output.spawn(log_lines(stream, label.clone(), last.clone()));
    }
    if let Some(stream) = child.stderr.take() {
        output.spawn(log_lines(stream, label, last.clone()));
    }

    let status = match tokio::time::timeout(limit, child.wait()).await {
        Ok(status) => Some(status.with_context(|| format!("cannot wait for the hook {shown}"))?),
        Err(_) => {
            group.signal(Signal::TERM);
            let _ = tokio::time::timeout(GRACE, child.wait()).await;
            group.signal(Signal::KILL);
            let _ = child.wait().await;
            None
        }
    };
    // The process is reaped, so another process may get its id.
    group.0 = None;
    // Child processes that the hook left running may keep the pipe open.
    let _ = tokio::time::timeout(DRAIN, async { while output.join_next().await.is_some() {} }).await;

    let last = last.lock().unwrap_or_else(PoisonError::into_inner);
    let lines = if last.is_empty() {
        String::new()
    } else {
        format!(": {}", Vec::from_iter(last.iter().map(String::as_str)).join("; "))
    };
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("the hook {shown} failed ({status}){lines}"),
        None => bail!("the hook {shown} was stopped after {} s (hooks.timeout){lines}", limit.as_secs_f64()),
    }
}

/// Process group of a hook, killed when this value is dropped.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // The call fails if the group has no process left, which is the desired state.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Logs each line of `stream`, and keeps the last ones.
async fn log_lines(stream: impl AsyncRead + Unpin, label: String, last: Arc<Mutex<VecDeque<String>>>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A longer line is logged in pieces.
        match (&mut stream).take(LONGEST_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.is_empty() {
            continue;
        }
        info!("{label}: {text}");
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.push_back(text.to_owned());
        if last.len() > LAST_LINES {
            last.pop_front();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;

    fn put(root: &Path, path: &str, mode: u32, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn names(root: &Path) -> Vec<String> {
        let shown = |hook: Hook| hook.path.strip_prefix(root).unwrap().display().to_string();
        find(root, Moment::PreSwitch).unwrap().into_iter().map(shown).collect()
    }

    #[test]
    fn backup_files_are_not_hooks() {
        for name in "a~ a.bak a.orig a.rpmnew a.rpmsave a.rpmorig a.dpkg-new a.dpkg-old a.dpkg-dist .a".split(' ') {
            assert!(!is_hook_name(name), "{name}");
        }
        assert!(is_hook_name("10-a") && is_hook_name("a.sh"));
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "etc/node-image-pivot/pre-switch.d", 0o644, "");
        let error = find(temp.path(), Moment::PreSwitch).unwrap_err().to_string();
        assert!(error.contains("pre-switch.d"), "{error}");
        assert_eq!(find(temp.path(), Moment::PostSwitch).unwrap(), []);
    }

    #[test]
    fn earlier_directories_hide_later_ones() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        assert_eq!(names(root), [""; 0]);
        for (path, mode) in [
            ("usr/lib/node-image-pivot/pre-switch.d/10-image", 0o755),
            ("usr/lib/node-image-pivot/pre-switch.d/20-both", 0o755),
            ("usr/lib/node-image-pivot/pre-switch.d/30-switched-off", 0o755),
            ("usr/lib/node-image-pivot/pre-switch.d/40-not-executable-in-run", 0o755),
            ("usr/lib/node-image-pivot/post-switch.d/05-other", 0o755),
            ("run/node-image-pivot/pre-switch.d/40-not-executable-in-run", 0o644),
            ("run/node-image-pivot/pre-switch.d/15-run", 0o755),
            ("etc/node-image-pivot/pre-switch.d/20-both", 0o700),
            ("etc/node-image-pivot/pre-switch.d/50-saved.rpmsave", 0o755),
            ("etc/node-image-pivot/pre-switch.d/50-saved~", 0o755),
            ("etc/node-image-pivot/pre-switch.d/.hidden", 0o755),
        ] {
            put(root, path, mode, "");
        }
        fs::create_dir(root.join("etc/node-image-pivot/pre-switch.d/60-directory")).unwrap();
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, root.join("etc/node-image-pivot/pre-switch.d").join(name)).unwrap();
        };
        link("/dev/null", "30-switched-off");
        link("/nonexistent", "70-dangling");
        link("20-both", "80-link");
        assert_eq!(
            names(root),
            [
                "usr/lib/node-image-pivot/pre-switch.d/10-image",
                "run/node-image-pivot/pre-switch.d/15-run",
                "etc/node-image-pivot/pre-switch.d/20-both",
                "etc/node-image-pivot/pre-switch.d/80-link",
            ]
        );
    }

    async fn script(text: &str, limit: Duration) -> Result<()> {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "hook", 0o755, text);
        let hook = Hook { name: "hook".into(), path: temp.path().join("hook") };
        let environment = || {
            [("NODE_IMAGE_PIVOT_HOOK", "pre-switch"), ("NOTIFY_SOCKET", "x"), ("CREDENTIALS_DIRECTORY", "x")]
                .map(|(name, value)| (name, value.into()))
        };
        loop {
            // A process that another test's thread forked may briefly have the file open for writing.
            match run_hook(&hook, Moment::PreSwitch, &environment(), limit).await {
                Err(error) if format!("{error:#}").contains("Text file busy") => tokio::task::yield_now().await,
                other => return other,
            }
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_failure_has_the_last_lines_of_output() {
        let environment = "test \"$NODE_IMAGE_PIVOT_HOOK$NOTIFY_SOCKET$CREDENTIALS_DIRECTORY\" = pre-switch";
        script(&format!("#!/bin/sh\n{environment}\n"), LONG).await.unwrap();
        let error =
            script("#!/bin/sh\nseq 1 9 >&2\necho the reason >&2\nexit 3\n", LONG).await.unwrap_err().to_string();
        assert!(error.ends_with("failed (exit status: 3): 8; 9; the reason"), "{error}");
        let error = script("#!/nonexistent\n", LONG).await.unwrap_err().to_string();
        assert!(error.contains("cannot start the hook"), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_exceeds_the_limit_is_killed_with_its_children() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("child");
        // The hook handles SIGTERM, its child ignores it.
        let text = format!(
            "#!/bin/sh\n(trap '' TERM; exec sleep 300) & echo $! >{}\ntrap 'echo asked; exit 1' TERM\necho waiting\nwait\n",
            file.display()
        );
        // On a slow machine, the limit may end before the hook handles SIGTERM.
        let mut limit = Duration::from_millis(500);
        let mut error = script(&text, limit).await.unwrap_err().to_string();
        while !error.contains("waiting") && limit < LONG {
            limit *= 4;
            error = script(&text, limit).await.unwrap_err().to_string();
        }
        let seconds = limit.as_secs_f64();
        assert!(error.ends_with(&format!("stopped after {seconds} s (hooks.timeout): waiting; asked")), "{error}");
        gone(&file).await;
    }

    /// Waits for the end of the process whose number is in `file`.
    async fn gone(file: &Path) {
        let process = fs::read_to_string(file).unwrap();
        let mut state = String::new();
        for _ in 0..4800 {
            state = fs::read_to_string(format!("/proc/{}/stat", process.trim())).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("{state}");
    }

    #[tokio::test]
    async fn a_hook_is_killed_when_its_future_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("itself");
        let text = format!("#!/bin/sh\necho $$ >{0}.new && mv {0}.new {0}\nexec sleep 300\n", file.display());
        let started = async {
            while !file.exists() {
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
        };
        tokio::select! {
            ended = script(&text, LONG) => panic!("{ended:?}"),
            () = started => {}
        }
        gone(&file).await;
    }

    #[tokio::test]
    async fn processes_that_a_hook_leaves_running_are_not_waited_for() {
        script("#!/bin/sh\nsleep 70 &\nexit 0\n", LONG).await.unwrap();
    }
}
