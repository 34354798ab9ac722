//! Runs one child process to its end, with a time limit and an error that quotes its stderr.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tracing::info;

use crate::failpoint::{self, Point};

/// Characters at the end of a failed program's stderr that its error quotes.
const QUOTED_STDERR: usize = 800;

/// Runs `command` (the program, then its arguments) with an empty stdin, and returns its stdout.
///
/// The stderr of a program that succeeds is logged line by line at level info.
///
/// # Errors
/// The program cannot be started, ends with a nonzero status or by a signal (the error quotes the end of its stderr),
/// or is still running after `limit` (the program is killed).
pub async fn run(command: &[&str], limit: Duration) -> Result<Vec<u8>> {
    run_with_input(command, b"", limit).await
}

/// Like [`run`], with `input` on the program's stdin.
///
/// A program that exits without reading all of `input` is judged by its status alone.
///
/// # Errors
/// As for [`run`].
pub async fn run_with_input(command: &[&str], input: &[u8], limit: Duration) -> Result<Vec<u8>> {
    let shown = command.join(" ");
    let [program, arguments @ ..] = command else { bail!("no program to run") };
    failpoint::hit(Point::Tool, program).with_context(|| shown.clone())?;
    let mut child = Command::new(program)
        .args(arguments)
        // Otherwise systemd would take the program's sd_notify messages for the agent's.
        .env_remove("NOTIFY_SOCKET")
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A broken pipe: the program's status tells whether it needed the rest.
            let _ = stdin.write_all(input).await;
        }
    };
    let ended = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(limit, ended)
        .await
        .with_context(|| format!("{shown}: killed, because it was still running after {} s", limit.as_secs()))?
        .with_context(|| format!("cannot wait for {shown}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let stderr = stderr.trim();
        let start = stderr.char_indices().rev().nth(QUOTED_STDERR).map_or(0, |(index, _)| index);
        bail!("{shown}: {}: {}", output.status, &stderr[start..]);
    }
    // For example, systemd-sysusers reports the users that it created and the lines that it ignored.
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        info!("{program}: {line}");
    }
    Ok(output.stdout)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_and_each_kind_of_failure_are_reported() {
        let limit = Duration::from_secs(120);
        assert_eq!(run(&["echo", "hello"], limit).await.unwrap(), b"hello\n");
        assert_eq!(run_with_input(&["cat"], b"fed", limit).await.unwrap(), b"fed");
        let error = run(&["sh", "-c", "echo the reason >&2; exit 3"], limit).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("the reason"), "{error}");
        let error = run(&["/nonexistent/program"], limit).await.unwrap_err().to_string();
        assert!(error.contains("cannot start /nonexistent/program"), "{error}");
        let error = run(&["sleep", "600"], Duration::from_millis(50)).await.unwrap_err().to_string();
        assert!(error.contains("killed, because it was still running after 0 s"), "{error}");
    }
}
