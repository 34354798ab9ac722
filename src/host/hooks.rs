//! Finds and runs hooks: executables of the administrator or of the node image that run before and after the switch, and
//! before and after a deployment to a disk.
//!
//! `docs/hooks.md` describes their directories and their environment. The caller decides about the consequences of a
//! failure.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use support::command::{Output, Program};
use support::failpoint::{self, Point};

/// Directories with hooks, relative to the root. A name in an earlier one hides the same name in a later one.
const DIRECTORIES: [&str; 3] = ["etc", "run", "usr/lib"];
/// The point of the pivot at which a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Moment {
    /// After all checks, before the running system is changed.
    PreSwitch,
    /// After the refresh.
    PostSwitch,
    /// Before anything is written to a disk.
    PreDeploy,
    /// After the boot loader entries of the disk were written.
    PostDeploy,
}

impl Moment {
    /// Returns its name in paths and in the environment.
    pub fn as_str(self) -> &'static str {
        self.into()
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
    let mut found = Vec::new();
    for entry in support::if_found(std::fs::read_dir(directory))?.into_iter().flatten() {
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
/// `limit`, or if this future is dropped, it is killed as [`Program`] describes.
///
/// # Errors
/// The hook did not start, did not exit within `limit`, or failed. The message has its last lines of output.
pub async fn run_hook(hook: &Hook, moment: Moment, environment: &[(&str, OsString)], limit: Duration) -> Result<()> {
    let shown = format!("the hook {}", hook.path.display());
    failpoint::hit(Point::Tool, &hook.name).with_context(|| shown.clone())?;
    let path = hook.path.to_string_lossy();
    let label = format!("{} hook {}", moment.as_str(), hook.name);
    let (limited_by, output) = (" (hooks.timeout)", Output::Logged);
    let mut program = Program { shown, limited_by, label, output, ..Program::new(&[&path], limit) };
    program.command.envs(environment.iter().map(|(name, value)| (*name, value)));
    program.end().await?.success().map(drop)
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
    async fn a_hook_has_its_environment_and_a_failure_names_it() {
        let environment = "test \"$NODE_IMAGE_PIVOT_HOOK$NOTIFY_SOCKET$CREDENTIALS_DIRECTORY\" = pre-switch";
        script(&format!("#!/bin/sh\n{environment}\n"), LONG).await.unwrap();
        let failing = "#!/bin/sh\necho a\necho the reason >&2\nexit 3\n";
        let error = script(failing, LONG).await.unwrap_err().to_string();
        assert!(error.starts_with("the hook /") && error.ends_with("failed (exit status: 3): the reason"), "{error}");
        let error = script("#!/nonexistent\n", LONG).await.unwrap_err().to_string();
        assert!(error.contains("cannot start the hook"), "{error}");
        let slow = "#!/bin/sh\nexec sleep 600\n";
        let error = script(slow, Duration::from_millis(500)).await.unwrap_err().to_string();
        assert!(error.ends_with("stopped after 0.5 s (hooks.timeout)"), "{error}");
    }
}
