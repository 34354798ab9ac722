//! Running one program to its end, with a limit and an error that holds what it said.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tracing::info;

use crate::failpoint::{self, Point};

/// How much of a failing program's stderr the error keeps.
const TAIL: usize = 800;

/// Runs `command` (program, then arguments), stdin empty. Returns its stdout; the error names the
/// command, its exit status and the end of its stderr. A program that outlives `limit` is killed.
pub async fn run(command: &[&str], limit: Duration) -> Result<Vec<u8>> {
    run_with_input(command, b"", limit).await
}

/// The same with `input` on its stdin.
pub async fn run_with_input(command: &[&str], input: &[u8], limit: Duration) -> Result<Vec<u8>> {
    let shown = command.join(" ");
    let [program, arguments @ ..] = command else { bail!("no program to run") };
    failpoint::hit(Point::Tool, program).with_context(|| shown.clone())?;
    let mut child = Command::new(program)
        .args(arguments)
        // It would report its own readiness as ours.
        .env_remove("NOTIFY_SOCKET")
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{shown}: cannot start"))?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // One that does not read it says so itself.
            let _ = stdin.write_all(input).await;
        }
    };
    let ended = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(limit, ended)
        .await
        .with_context(|| format!("{shown}: killed after {} s", limit.as_secs()))?
        .with_context(|| format!("{shown}: cannot wait for it"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let start = said.char_indices().rev().nth(TAIL).map_or(0, |(index, _)| index);
        bail!("{shown}: {}: {}", output.status, &said[start..]);
    }
    // Such as lines that systemd-sysusers ignored, and users that it created.
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
    async fn output_failure_and_limit() {
        let limit = Duration::from_secs(10);
        assert_eq!(run(&["echo", "hello"], limit).await.unwrap(), b"hello\n");
        assert_eq!(run_with_input(&["cat"], b"fed", limit).await.unwrap(), b"fed");
        let error = run(&["sh", "-c", "echo the reason >&2; exit 3"], limit).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("the reason"), "{error}");
        let error = run(&["/nonexistent/program"], limit).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/program: cannot start"), "{error}");
        let error = run(&["sleep", "60"], Duration::from_millis(50)).await.unwrap_err().to_string();
        assert!(error.contains("killed after"), "{error}");
    }
}
