//! Starting programs.

use std::ffi::OsStr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs a program to its end; its standard output. A failure carries the end of what it said.
pub fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Result<String> {
    output(Command::new(program).args(args))
}

/// The same for a prepared command.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let tail = &lines[lines.len().saturating_sub(15)..];
    ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, tail.join("\n"));
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
