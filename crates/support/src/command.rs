//! Runs one child process to its end, with a time limit, bounded output, and errors that quote the output.

use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;
use tracing::info;

use crate::failpoint::{self, Point};

/// Time between SIGTERM and SIGKILL for a program that exceeds its time limit.
const GRACE: Duration = Duration::from_secs(5);
/// Time to read remaining output after the program has ended. Processes that it left running may keep its pipes open.
const DRAIN: Duration = Duration::from_secs(1);
/// Length in bytes at which a line of output is split.
const LONGEST_LINE: u64 = 2000;
/// Largest number of bytes of each output that is kept.
const LARGEST: usize = 4 << 20;
/// Number of the last lines of output in the message of a failure.
const LAST_LINES: usize = 3;

/// A program to run, with an empty stdin and `/` as its directory.
pub struct Program<'a> {
    /// The program, its arguments and its environment.
    pub command: Command,
    /// Its name in errors; at first the command line.
    pub shown: String,
    /// The time after which its process group gets SIGTERM, and SIGKILL 5 s later.
    pub limit: Duration,
    /// The origin of the limit in errors, such as a setting.
    pub limited_by: &'static str,
    /// Text for its stdin.
    pub input: &'a [u8],
    /// Name in the log for each line of its stderr, and of its stdout with [`Output::Logged`].
    pub label: String,
    /// The use of its stdout.
    pub output: Output,
}

/// The use of a program's stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// The caller reads it.
    Kept,
    /// It is for the log.
    Logged,
}

/// The result of a program that ended within its time limit.
#[derive(Debug)]
pub struct Ended {
    shown: String,
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output, at most about its first 4 MiB.
    pub stdout: Vec<u8>,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Program<'_> {
    /// Prepares a call of `argv` (the program, then its arguments).
    pub fn new(argv: &[&str], limit: Duration) -> Self {
        let (program, arguments) = argv.split_first().unwrap_or((&"", &[]));
        let mut command = Command::new(program);
        command.args(arguments);
        let (shown, label) = (argv.join(" "), (*program).to_owned());
        Self { command, shown, limit, limited_by: "", input: b"", label, output: Output::Kept }
    }

    /// Runs the program until it ends. Processes that it leaves running are not waited for. If this future is dropped, its
    /// process group gets SIGKILL at once.
    ///
    /// # Errors
    /// The program cannot be started, or exceeds its time limit. The message has its last lines of output.
    pub async fn end(mut self) -> Result<Ended> {
        let command = self.command.current_dir("/").process_group(0);
        // systemd would take the program's sd_notify messages for the agent's. The credentials are the agent's too.
        command.env_remove("NOTIFY_SOCKET").env_remove("CREDENTIALS_DIRECTORY");
        command.stdin(if self.input.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.shown))?;
        let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
        let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let label = Some(self.label.as_str());
        let exchange = async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // After a broken pipe, the program's status shows if it needed the rest.
                    let _ = stdin.write_all(self.input).await;
                }
            };
            let label_of_stdout = label.filter(|_| self.output == Output::Logged);
            tokio::join!(feed, keep(out, &mut stdout, label_of_stdout), keep(err, &mut stderr, label));
        };
        let end = async {
            let status = timeout(self.limit, child.wait()).await.ok();
            if status.is_none() {
                group.signal(Signal::TERM);
                let _ = timeout(GRACE, child.wait()).await;
                group.signal(Signal::KILL);
                let _ = child.wait().await;
            }
            // The process is reaped, so another process may get its id.
            group.0 = None;
            status.transpose()
        };
        let status = {
            let (mut end, mut exchange) = (pin!(end), pin!(exchange));
            tokio::select! {
                status = &mut end => {
                    let _ = timeout(DRAIN, exchange).await;
                    status
                }
                _ = &mut exchange => end.await,
            }
        };
        let status = status.with_context(|| format!("cannot wait for {}", self.shown))?;
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let Some(status) = status else {
            let (limit, lines) = (self.limit.as_secs_f64(), last_lines(&stdout, &stderr));
            bail!("{} was stopped after {limit} s{}{lines}", self.shown, self.limited_by);
        };
        Ok(Ended { shown: self.shown, status, stdout, stderr })
    }

    /// Runs the program like [`Self::end`], on the calling thread, so in its namespaces.
    ///
    /// # Errors
    /// Those of [`Self::end`].
    pub fn end_blocking(self) -> Result<Ended> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.context("cannot start a runtime for a program")?.block_on(self.end())
    }
}

impl Ended {
    /// Returns the program's stdout.
    ///
    /// # Errors
    /// The program failed. The message has its last lines of output.
    pub fn success(self) -> Result<Vec<u8>> {
        if !self.status.success() {
            bail!("{} failed ({}){}", self.shown, self.status, last_lines(&self.stdout, &self.stderr));
        }
        Ok(self.stdout)
    }
}

/// Returns the last lines of stderr, or those of stdout if stderr is empty, as the end of a message.
fn last_lines(stdout: &[u8], stderr: &str) -> String {
    let stdout = String::from_utf8_lossy(stdout);
    let text = if stderr.trim().is_empty() { &stdout } else { stderr };
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("; ");
    if last.is_empty() { last } else { format!(": {last}") }
}

/// The process group of a program, killed when this value is dropped.
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

/// Reads `stream` to its end, and keeps at most [`LARGEST`] bytes. Logs each line with `label`, if given.
async fn keep(stream: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>, label: Option<&str>) {
    let Some(stream) = stream else { return };
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    // A longer line is logged in pieces.
    while matches!((&mut stream).take(LONGEST_LINE).read_until(b'\n', &mut line).await, Ok(1..)) {
        let text = String::from_utf8_lossy(&line);
        if let Some(label) = label.filter(|_| !text.trim_end().is_empty()) {
            info!("{label}: {}", text.trim_end());
        }
        if kept.len() < LARGEST {
            kept.extend_from_slice(&line);
        }
        line.clear();
    }
}

/// Runs `command` (the program, then its arguments) with an empty stdin, and returns its stdout.
///
/// # Errors
/// The program cannot be started, fails, or exceeds `limit`.
pub async fn run(command: &[&str], limit: Duration) -> Result<Vec<u8>> {
    run_with_input(command, b"", limit).await
}

/// Like [`run`], with `input` on the program's stdin. A program that exits without reading all of `input` is judged by its
/// status alone.
///
/// # Errors
/// As for [`run`].
pub async fn run_with_input(command: &[&str], input: &[u8], limit: Duration) -> Result<Vec<u8>> {
    failpoint::hit(Point::Tool, command.first().unwrap_or(&"")).with_context(|| command.join(" "))?;
    Program { input, ..Program::new(command, limit) }.end().await?.success()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    const LONG: Duration = Duration::from_secs(600);

    async fn script(text: &str, limit: Duration) -> Result<Vec<u8>> {
        run(&["sh", "-c", text], limit).await
    }

    #[tokio::test]
    async fn output_and_each_kind_of_failure_are_reported() {
        assert_eq!(run(&["echo", "hello"], LONG).await.unwrap(), b"hello\n");
        assert_eq!(run_with_input(&["cat"], b"fed", LONG).await.unwrap(), b"fed");
        let error = script("seq 1 9 >&2; echo the reason >&2; exit 3", LONG).await.unwrap_err().to_string();
        assert!(error.ends_with("exit 3 failed (exit status: 3): 8; 9; the reason"), "{error}");
        let error = script("kill -9 $$", LONG).await.unwrap_err().to_string();
        assert!(error.contains("failed (signal: 9"), "{error}");
        let error = run(&["/nonexistent/program"], LONG).await.unwrap_err().to_string();
        assert!(error.contains("cannot start /nonexistent/program"), "{error}");
        let error = run(&["sleep", "600"], Duration::from_millis(50)).await.unwrap_err().to_string();
        assert_eq!(error, "sleep 600 was stopped after 0.05 s");
    }

    #[test]
    fn a_blocking_caller_gets_the_same_answers() {
        let ended = Program::new(&["sh", "-c", "echo out; echo err >&2; exit 7"], LONG).end_blocking().unwrap();
        assert_eq!(
            (ended.status.code(), ended.stdout.as_slice(), ended.stderr.as_str()),
            (Some(7), &b"out\n"[..], "err\n")
        );
        let error = Program::new(&["sleep", "600"], Duration::from_millis(50)).end_blocking().unwrap_err().to_string();
        assert!(error.contains("stopped after"), "{error}");
    }

    #[tokio::test]
    async fn the_kept_output_is_bounded_and_all_of_it_is_read() {
        let kept = script("yes $(printf %01000d 0) | head -c 9000000", LONG).await.unwrap();
        assert!(kept.len() >= LARGEST && kept.len() <= LARGEST + LONGEST_LINE as usize, "{}", kept.len());
    }

    #[tokio::test]
    async fn a_program_that_exceeds_the_limit_is_killed_with_its_children() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("child");
        // The program handles SIGTERM, its child ignores it.
        let text = format!(
            "(trap '' TERM; exec sleep 300) & echo $! >{}\ntrap 'echo asked; exit 1' TERM\necho waiting\nwait\n",
            file.display()
        );
        // On a slow machine, the limit may end before the program handles SIGTERM.
        let mut limit = Duration::from_millis(500);
        let mut error = script(&text, limit).await.unwrap_err().to_string();
        while !error.contains("waiting") && limit < LONG {
            limit *= 4;
            error = script(&text, limit).await.unwrap_err().to_string();
        }
        assert!(error.ends_with(&format!("was stopped after {} s: waiting; asked", limit.as_secs_f64())), "{error}");
        gone(&file).await;
    }

    /// Waits for the end of the process whose number is in `file`.
    async fn gone(file: &Path) {
        let process = std::fs::read_to_string(file).unwrap();
        let mut state = String::new();
        for _ in 0..4800 {
            state = std::fs::read_to_string(format!("/proc/{}/stat", process.trim())).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("{state}");
    }

    #[tokio::test]
    async fn a_program_is_killed_when_its_future_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("itself");
        let text = format!("echo $$ >{0}.new && mv {0}.new {0}\nexec sleep 300\n", file.display());
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
    async fn processes_that_a_program_leaves_running_are_not_waited_for() {
        script("sleep 70 & exit 0", LONG).await.unwrap();
    }
}
