//! Runs the generator on golden directories. Each `NN-name` is a small root. The test runs the binary on a copy of it, and
//! compares its output with `run.expected` and its messages with `log.expected`.
//!
//! Optional files of a case: `environment` (lines `KEY=value`) and `arguments` (how many output
//! directories it is called with; 3 when missing). Set `UPDATE_GOLDEN=1` to rewrite `log.expected`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

const BINARY: &str = env!("CARGO_BIN_EXE_node-image-pivot-generator");
const DIRECTORIES: [&str; 3] = ["generator", "generator.early", "generator.late"];

fn cases() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut cases: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    cases
}

/// Copies a directory and its content.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&path, &to),
            kind if kind.is_symlink() => symlink(fs::read_link(path).unwrap(), to).unwrap(),
            _ => drop(fs::copy(path, to).unwrap()),
        }
    }
}

/// Runs the generator on `case`, which must be a copy.
fn run(case: &Path, output: &Path) -> Output {
    let count = fs::read_to_string(case.join("arguments")).map_or(3, |n| n.trim().parse().unwrap());
    let mut command = Command::new(BINARY);
    command.env_clear().env("NODE_IMAGE_PIVOT_GENERATOR_ROOT", case);
    for line in fs::read_to_string(case.join("environment")).unwrap_or_default().lines() {
        let (key, value) = line.split_once('=').unwrap();
        command.env(key, value);
    }
    command.args(DIRECTORIES.iter().take(count).map(|name| output.join(name))).output().unwrap()
}

/// Returns all files and links below `directory`: relative path and content or target.
fn tree(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let name = path.strip_prefix(directory).unwrap().to_owned();
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_symlink() {
                found.insert(name, format!("-> {}", fs::read_link(path).unwrap().display()));
            } else if entry.file_name() != ".gitkeep" {
                found.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    found
}

#[test]
fn every_case_has_the_expected_result_twice() {
    let cases = cases();
    assert!(cases.len() > 30, "the golden directories are missing");
    for case in cases {
        let name = case.file_name().unwrap().to_str().unwrap().to_owned();
        let (root, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        copy(&case, root.path());
        for directory in DIRECTORIES {
            fs::create_dir(output.path().join(directory)).unwrap();
        }
        let expected = tree(&case.join("run.expected"));
        for round in ["first", "second"] {
            let result = run(root.path(), output.path());
            let log = String::from_utf8(result.stderr).unwrap().replace(root.path().to_str().unwrap(), "ROOT");
            assert!(result.status.success(), "{name}, {round} run: a generator never fails: {log}");
            assert_eq!(tree(output.path()), expected, "{name}, {round} run: {log}");
            if std::env::var_os("UPDATE_GOLDEN").is_some() {
                fs::write(case.join("log.expected"), &log).unwrap();
            }
            assert_eq!(log, fs::read_to_string(case.join("log.expected")).unwrap(), "{name}, {round} run");
        }
    }
}

/// Returns a copy of the case in which the boot is redirected.
fn base_only() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/01-base-only"), root.path());
    root
}

#[test]
fn an_unwritable_directory_leaves_the_boot_unchanged() {
    let (case, output) = (base_only(), tempfile::tempdir().unwrap());
    let case = case.path();
    fs::write(output.path().join("generator"), "a file where the directory should be").unwrap();
    fs::create_dir(output.path().join("generator.early")).unwrap();
    let result = run(case, output.path());
    assert!(result.status.success());
    assert!(!case.join("run/node-image-pivot/redirected").exists(), "no mark without a redirect");
    assert_eq!(tree(&output.path().join("generator.early")), BTreeMap::new(), "no link without the original target");
    let log = String::from_utf8(result.stderr).unwrap();
    assert!(log.starts_with("<4>node-image-pivot-generator: cannot write "), "{log}");
}

#[test]
fn a_call_without_arguments_is_reported_and_succeeds() {
    let result = Command::new(BINARY).env("NODE_IMAGE_PIVOT_GENERATOR_ROOT", "/nonexistent").output().unwrap();
    assert!(result.status.success());
    assert!(String::from_utf8(result.stderr).unwrap().contains("output directory"));
}

/// Prints the start-up time (`cargo test -- --nocapture`). It is not asserted, because it depends on the load.
#[test]
fn start_up_time() {
    let (case, output) = (base_only(), tempfile::tempdir().unwrap());
    let mut times: Vec<_> = (0..25)
        .map(|_| {
            let start = Instant::now();
            run(case.path(), output.path());
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("start to exit, median of 25 (spawning included): {:.1} ms", times[12].as_secs_f64() * 1e3);
}
