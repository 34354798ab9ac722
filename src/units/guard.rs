//! Somebody who re-executes PID 1 should we die in an undo, when `/usr` is not the one it comes from.
//!
//! From version 255 on systemd starts services through a program and libraries of its own `/usr`. With
//! another one in place it can start none, us included, until it is re-executed: a kill in that moment
//! would leave the undo half done for good. (Not so in a switch: there users, files and caches come before
//! PID 1 is re-executed, and whoever calls the agent next sees to it that PID 1 can start it.)

use std::io::Write;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// Nothing but builtins: programs that it would start might be those of either `/usr`. A line is the end;
/// an end of input without one is our death. SIGTERM is systemd's word for re-executing itself.
const SCRIPT: &str = "trap '' TERM HUP INT; read -r _ || kill -TERM 1";

/// A process that watches over us. Dropped, it ends.
pub struct Guard {
    child: Child,
}

impl Guard {
    /// Starts it; before the node image's `/usr` goes.
    ///
    /// # Errors
    /// The shell cannot be started.
    pub fn start() -> Result<Self> {
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a shell to watch over us")?;
        Ok(Self { child })
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
