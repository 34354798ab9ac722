//! Questions that tests ask a guest of any kind.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::proc::wait_for;

/// Result of a command in the guest.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Exit status; 255 is ssh's own failure.
    pub status: i32,
    /// Standard output and error, in the order they came.
    pub text: String,
}

impl Answer {
    /// From a finished local process (the carrier).
    pub fn of(output: &std::process::Output) -> Self {
        let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        Answer { status: output.status.code().unwrap_or(128), text: String::from_utf8_lossy(&text).into_owned() }
    }
}

/// A booted system.
pub trait Guest {
    /// Run a shell command as root.
    fn run(&self, command: &str) -> Result<Answer>;

    /// The same over a new ssh connection: a fresh login.
    fn login(&self, command: &str) -> Result<Answer>;

    /// Returns the output of the console so far.
    fn console(&self) -> String;

    /// Address of the host's registry as the guest sees it.
    fn registry_host(&self) -> &'static str;

    /// Returns true if the guest has its own kernel, modules and initramfs.
    fn has_own_kernel(&self) -> bool;

    /// Returns the directory of journal and console log.
    fn work(&self) -> &Path;

    /// Standard output of a command that must succeed, without the last line end.
    fn ask(&self, command: &str) -> Result<String> {
        let answer = self.run(command)?;
        if answer.status != 0 {
            bail!("{command}: exit status {}:\n{}", answer.status, answer.text);
        }
        Ok(answer.text.trim_end().to_string())
    }

    /// A property of a unit.
    fn unit(&self, unit: &str, property: &str) -> Result<String> {
        self.ask(&format!("systemctl show --property={property} --value {unit}"))
    }

    /// The agent's status document.
    fn status(&self) -> Result<Value> {
        let text = self.ask("node-image-pivot status --json")?;
        serde_json::from_str(&text).with_context(|| format!("status --json is not JSON:\n{text}"))
    }

    /// Wait until a unit is in a state; a unit that failed instead ends the wait.
    fn wait_unit(&self, unit: &str, wanted: &str, limit: Duration) -> Result<()> {
        wait_for(&format!("{unit} {wanted}"), limit, || {
            let state = self.unit(unit, "ActiveState")?;
            Ok(state == wanted)
        })
    }

    /// Keeps journal and status, to find the cause of a failure.
    fn collect(&self) {
        for (file, command) in [
            ("journal", "journalctl --no-pager -o short-monotonic -b"),
            ("units", "systemctl --no-pager --failed; systemctl list-jobs; systemctl --no-pager status 'node-image-*'"),
            ("status.json", "node-image-pivot status --json"),
        ] {
            // A guest that does not answer has left its console log.
            match self.run(command) {
                Ok(answer) if answer.status != 255 => drop(std::fs::write(self.work().join(file), answer.text)),
                _ => return,
            }
        }
    }
}

/// ssh with the test bed's key; `options` for port and multiplexing.
pub fn ssh(key: &Path) -> Command {
    let mut command = Command::new("ssh");
    command.arg("-i").arg(key).args([
        "-oBatchMode=yes",
        "-oStrictHostKeyChecking=no",
        "-oUserKnownHostsFile=/dev/null",
        "-oLogLevel=ERROR",
        "-oConnectTimeout=30",
        // The cheapest there is: the far end computes in software emulation.
        "-oKexAlgorithms=curve25519-sha256",
        "-oCiphers=chacha20-poly1305@openssh.com",
        "-oServerAliveInterval=20",
        "-oServerAliveCountMax=6",
    ]);
    command
}
