//! Runs systemd-sysusers so that a file or line that it rejects does not prevent it from applying the others.
//!
//! The tool writes nothing at all if one account cannot be created, for example because `/etc/gshadow` has a line for a
//! group that `/etc/group` lacks.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use tokio::time::Instant;
use tracing::info;

use super::{LIMIT, Tool};
use support::command::run_with_input;

/// Directories of sysusers.d(5), by precedence.
const DIRECTORIES: &[&str] = &["etc/sysusers.d", "run/sysusers.d", "usr/local/lib/sysusers.d", "usr/lib/sysusers.d"];

/// The kind of items that are passed to the tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Items {
    /// Paths of files; an empty list stands for all files of the system.
    Files,
    /// Lines of sysusers.d(5).
    Lines,
}

/// Creates the accounts of all files of the system at `root`. Returns a line for each file that failed.
pub(super) async fn apply_files(root: &Path) -> Vec<String> {
    let deadline = Instant::now() + LIMIT;
    // All files in one run first, because a file may name accounts of another one.
    let Err(error) = sysusers(root, Items::Files, &[], deadline).await else { return Vec::new() };
    let files = files(root);
    info!("{error:#}; applying {} files in parts", files.len());
    let failed = in_parts(root, Items::Files, &files, deadline).await;
    if failed.len() == files.len() {
        return vec![format!("{error:#}")];
    }
    let line = |(file, error): (&String, Error)| {
        format!(
            "cannot create the accounts of {file}: {error:#}; correct the account that it names, then run systemd-sysusers {file}"
        )
    };
    failed.into_iter().map(line).collect()
}

/// Creates the accounts of lines of sysusers.d(5). Returns a line for each that failed.
pub(super) async fn apply_lines(root: &Path, lines: &[String]) -> Vec<String> {
    let deadline = Instant::now() + LIMIT;
    if lines.is_empty() || sysusers(root, Items::Lines, lines, deadline).await.is_ok() {
        return Vec::new();
    }
    let failed = in_parts(root, Items::Lines, lines, deadline).await;
    let line = |(line, error)| format!("cannot create an account of the node image: {error:#}; the line is: {line}");
    failed.into_iter().map(line).collect()
}

/// Runs the tool once.
async fn sysusers(root: &Path, kind: Items, items: &[String], deadline: Instant) -> Result<()> {
    let mut command: Vec<&str> = Tool::Sysusers.parts().0.to_vec();
    let place = format!("--root={}", root.display());
    if root != Path::new("/") {
        command.push(&place);
    }
    let input = match kind {
        Items::Files => {
            command.extend(items.iter().map(String::as_str));
            String::new()
        }
        Items::Lines => {
            command.push("-");
            items.join("\n") + "\n"
        }
    };
    let left = deadline.saturating_duration_since(Instant::now());
    run_with_input(&command, input.as_bytes(), left).await.map(drop)
}

/// Applies a list, known to fail as a whole, in halves, in order, until the single items that fail are known.
async fn in_parts<'a>(root: &Path, kind: Items, items: &'a [String], deadline: Instant) -> Vec<(&'a String, Error)> {
    let mut failed = Vec::new();
    let mut pending: Vec<&[String]> = match items {
        [_] => vec![items],
        items => halves(items).collect(),
    };
    while let Some(part) = pending.pop() {
        match (sysusers(root, kind, part, deadline).await, part) {
            (Ok(()), _) => {}
            (Err(error), [item]) => failed.push((item, error)),
            (Err(_), part) => pending.extend(halves(part)),
        }
    }
    failed
}

/// Returns the second half first, because the last part that is pushed is taken next.
fn halves(items: &[String]) -> impl Iterator<Item = &[String]> {
    let (first, second) = items.split_at(items.len() / 2);
    [second, first].into_iter().filter(|half| !half.is_empty())
}

/// Returns the files that the tool reads, sorted by name. The first directory that has a name decides; masks are skipped.
fn files(root: &Path) -> Vec<String> {
    let mut found = BTreeMap::new();
    for directory in DIRECTORIES {
        for entry in fs::read_dir(root.join(directory)).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let shown = name.to_string_lossy();
            if shown.ends_with(".conf") && !shown.starts_with('.') {
                found.entry(name).or_insert_with(|| entry.path());
            }
        }
    }
    let has_text = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0);
    found.into_values().filter(has_text).map(|path| path.to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Creates a system whose gshadow has a group that its group file lacks.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let base = [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"),
            ("etc/group", "root:x:0:\n"),
            ("etc/shadow", "root:*::0:99999:7:::\n"),
            ("etc/gshadow", "root:::\nsgx:::\n"),
        ];
        for (path, text) in base.iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn has(root: &Path, name: &str) -> bool {
        let users = fs::read_to_string(root.join("etc/passwd")).unwrap();
        users.lines().any(|line| line.starts_with(&format!("{name}:")))
    }

    #[tokio::test]
    async fn a_stale_group_fails_its_file_alone() {
        let root = system(&[
            ("usr/lib/sysusers.d/a.conf", "u first 301\n"),
            ("usr/lib/sysusers.d/basic.conf", "g sgx -\nu basic -\n"),
            ("usr/lib/sysusers.d/node.conf", "u openvswitch -\n"),
            ("usr/lib/sysusers.d/other.conf", "u chrony -\nm chrony openvswitch\n"),
        ]);
        let failed = apply_files(root.path()).await;
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].contains("basic.conf") && failed[0].contains("sgx"), "{failed:?}");
        for (name, expected) in [("first", true), ("basic", false), ("openvswitch", true), ("chrony", true)] {
            assert_eq!(has(root.path(), name), expected, "{name}");
        }
        assert!(!has(root.path(), "sgx"));
    }

    #[tokio::test]
    async fn valid_files_may_name_accounts_of_each_other() {
        let root =
            system(&[("usr/lib/sysusers.d/a.conf", "u later -\n"), ("usr/lib/sysusers.d/b.conf", "m x later\n")]);
        assert_eq!(apply_files(root.path()).await, [""; 0]);
        assert!(has(root.path(), "later") && has(root.path(), "x"));
    }

    #[tokio::test]
    async fn lines_fail_alone() {
        let root = system(&[]);
        let lines = ["g sgx 300", "g good 301", "u good 301:301 \"G\" / /bin/sh"].map(str::to_owned);
        let failed = apply_lines(root.path(), &lines).await;
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].ends_with("g sgx 300") && has(root.path(), "good"), "{failed:?}");
        assert_eq!(apply_lines(root.path(), &[]).await, [""; 0]);
    }

    #[test]
    fn of_equal_names_the_first_directory_wins() {
        let root = system(&[
            ("etc/sysusers.d/a.conf", "x"),
            ("run/sysusers.d/a.conf", "x"),
            ("usr/lib/sysusers.d/a.conf", "x"),
            ("usr/lib/sysusers.d/masked.conf", "x"),
            ("run/sysusers.d/b.conf", "x"),
            ("usr/lib/sysusers.d/b.conf", "x"),
            ("usr/lib/sysusers.d/0.conf", "x"),
            ("usr/lib/sysusers.d/.hidden.conf", "x"),
            ("usr/lib/sysusers.d/readme", "x"),
            ("usr/lib/sysusers.d/empty.conf", ""),
        ]);
        symlink("/dev/null", root.path().join("etc/sysusers.d/masked.conf")).unwrap();
        let found = files(root.path());
        let found: Vec<_> =
            found.iter().map(|path| Path::new(path).strip_prefix(root.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(found, ["usr/lib/sysusers.d/0.conf", "etc/sysusers.d/a.conf", "run/sysusers.d/b.conf"]);
    }
}
