//! A watchdog process that re-executes PID 1 if the agent dies while the mounted `/usr` is not the one that PID 1 was
//! started from.
//!
//! Since version 255, systemd starts services through `systemd-executor`, which needs the libraries of the same `/usr`. With
//! another `/usr` in place it cannot start any service, the agent included, until it is re-executed. Without the
//! watchdog, a kill at that moment would leave the switch or the undo half done permanently.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// The watchdog's script. It uses only builtins, because external programs could come from either `/usr`. It prints a line
/// when it is ready, and exits when it reads one. End of input without a line means that the agent died. systemd
/// re-executes itself on SIGTERM (systemd(1)).
const SCRIPT: &str = "trap '' TERM HUP INT; echo; read -r _ || kill -TERM 1";

/// The control group of PID 1. systemd kills the processes of a service whose main process died (`KillMode=mixed`), and the
/// watchdog with them if it is in the group of the agent.
const GROUP: &str = "/sys/fs/cgroup/init.scope/cgroup.procs";

/// A running watchdog process. Dropping it ends the process without a re-execution.
pub struct Guard {
    child: Child,
}

impl Guard {
    /// Starts the watchdog; call this before `/usr` is replaced. Returns when the watchdog is ready: its shell must load
    /// its libraries from the old `/usr`.
    ///
    /// # Errors
    /// Fails if the shell cannot be started or exits at once.
    pub fn start() -> Result<Self> {
        Self::run(SCRIPT)
    }

    fn run(script: &str) -> Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", script])
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the PID 1 watchdog shell")?;
        // Without such a group, the watchdog may still be faster than systemd.
        let _ = std::fs::write(GROUP, child.id().to_string());
        let ready = child.stdout.take().map(|mut output| output.read_exact(&mut [0]));
        let guard = Self { child };
        match ready {
            Some(Ok(())) => Ok(guard),
            _ => anyhow::bail!("the PID 1 watchdog shell exited immediately"),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut input) = self.child.stdin.take() {
            // A write error means that the shell has already exited.
            let _ = input.write_all(b"\n");
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    #[test]
    fn a_started_watchdog_acts_when_the_agent_dies() {
        // The real script, except for the signal, which would re-execute the PID 1 of the machine that runs the test.
        let script = SCRIPT.replace("kill -TERM 1", "exit 7");
        for _ in 0..50 {
            let mut guard = Guard::run(&script).unwrap();
            // systemd sends SIGTERM to the remaining processes of a service whose main process died.
            kill(Pid::from_raw(guard.child.id().cast_signed()), Signal::SIGTERM).unwrap();
            drop(guard.child.stdin.take());
            assert_eq!(guard.child.wait().unwrap().code(), Some(7));
        }
        assert!(Guard::run("exit 3").is_err());
    }

    #[test]
    fn a_dropped_watchdog_does_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let acted = temp.path().join("acted");
        let guard = Guard::run(&SCRIPT.replace("kill -TERM 1", &format!("echo >{}", acted.display()))).unwrap();
        let state = format!("/proc/{}/stat", guard.child.id());
        drop(guard);
        let runs = || std::fs::read_to_string(&state).is_ok_and(|state| !state.contains(") Z "));
        for _ in (0..12_000).take_while(|_| runs()) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!runs() && !acted.exists());
    }
}
