//! The importer of an earlier commit, as one more side of each round.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::proc::{output, run};

/// Builds the benchmark of a commit of this project from its own sources, below `target`. Returns the program, whose
/// `pull` is that commit's importer.
pub fn program(revision: &str) -> Result<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let git = |args: [&str; 3]| run("git", [&["-C", &project.display().to_string()], &args[..]].concat());
    let commit = git(["rev-parse", "--verify", &format!("{revision}^{{commit}}")])?;
    let place = project.join("target/bench-before").join(&commit);
    let (sources, target) = (place.join("sources"), place.join("target"));
    if !sources.exists() {
        let partial = place.join("sources.tmp");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        let archive = place.join("sources.tar");
        git(["archive", &format!("--output={}", archive.display()), &commit])?;
        output(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&partial))?;
        fs::remove_file(archive)?;
        fs::rename(partial, &sources)?;
    }
    eprintln!("benchmark: building the importer of {commit}");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--locked", "--quiet", "-p", "benchmark", "--target-dir"]).arg(&target);
    output(cargo.current_dir(&sources).stdin(Stdio::null())).with_context(|| {
        format!("cannot build the benchmark of {revision}; set BENCH_BEFORE= to a commit that has one")
    })?;
    Ok(target.join("release/benchmark"))
}
