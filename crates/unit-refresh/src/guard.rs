//! Somebody who re-executes PID 1 should we die in a switch or an undo, when `/usr` is not the one it comes from.
//!
//! From version 255 on systemd starts services through a program and libraries of its own `/usr`. With
//! another one in place it can start none, us included, until it is re-executed: a kill in that moment
//! would leave the switch or the undo half done for good.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// Nothing but builtins: programs that it would start might be those of either `/usr`. Its first line says that
/// it is there. A line to it is the end; an end of input without one is our death. SIGTERM is systemd's word for
/// re-executing itself.
const SCRIPT: &str = "trap '' TERM HUP INT; echo; read -r _ || kill -TERM 1";

/// A process that watches over us. Dropped, it ends.
pub struct Guard {
    child: Child,
}

impl Guard {
    /// Starts it; before the node image's `/usr` goes. Returns when it watches: until then its libraries are still
    /// being loaded, and those of another `/usr` would be the wrong ones.
    ///
    /// # Errors
    /// The shell cannot be started, or ends at once.
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
            .context("cannot start a shell to watch over us")?;
        let told = child.stdout.take().map(|mut output| output.read_exact(&mut [0]));
        let guard = Self { child };
        match told {
            Some(Ok(())) => Ok(guard),
            _ => anyhow::bail!("the shell that is to watch over us ended at once"),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut input) = self.child.stdin.take() {
            // It may be gone already; then nobody has to be told.
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
    fn it_watches_when_it_was_started() {
        // Of the shell's own script all but the last word, which would re-execute the PID 1 of whoever tests.
        let script = SCRIPT.replace("kill -TERM 1", "exit 7");
        for _ in 0..50 {
            let mut guard = Guard::run(&script).unwrap();
            // What systemd sends to the rest of a service whose main process died.
            kill(Pid::from_raw(guard.child.id().cast_signed()), Signal::SIGTERM).unwrap();
            drop(guard.child.stdin.take());
            assert_eq!(guard.child.wait().unwrap().code(), Some(7));
        }
        assert!(Guard::run("exit 3").is_err());
    }

    #[test]
    fn told_that_all_is_well_it_does_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let acted = temp.path().join("acted");
        let guard = Guard::run(&SCRIPT.replace("kill -TERM 1", &format!("echo >{}", acted.display()))).unwrap();
        let state = format!("/proc/{}/stat", guard.child.id());
        drop(guard);
        let runs = || std::fs::read_to_string(&state).is_ok_and(|state| !state.contains(") Z "));
        for _ in (0..400).take_while(|_| runs()) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!runs() && !acted.exists());
    }
}
