//! In the place of the installer's scripts: each promise that others rely on; docs/contract.md has the table. On virtual
//! machines, with separate kernels and cgroups; podman.rs has podman, in a container.
//! `make check-one NAME=dropin`

mod assisted;
mod attached;
mod installer;

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::Images;
use testbed::vm::{self, Medium, Vm};

const BOOT: Duration = Duration::from_secs(300);
const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);
const UNITS: [&str; 2] = ["node-image-pull.service", "node-image-overlay.service"];

/// Boots a live medium and waits for ssh.
fn boot(name: &str, boot: &std::path::Path, medium: Medium<'_>, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Vm> {
    // In the PXE form, the root of the medium takes memory.
    let memory_mib = if matches!(medium, Medium::Pxe) { 2304 } else { 2048 };
    let setup = vm::Setup { medium, memory_mib, ..vm::Setup::live(name, boot) };
    let guest = Vm::start(Images::ensure()?, &setup, fill)?;
    guest.wait_ssh(BOOT)?;
    Ok(guest)
}

fn journal(guest: &dyn Guest) -> Result<String> {
    guest.ask("journalctl -u node-image-pivotd.service -o cat")
}

/// Returns the entries of a service record: stage, phase, result.
fn record(guest: &dyn Guest, unit: &str) -> Result<Vec<String>> {
    let text = guest.ask(&format!("cat /var/log/openshift/{unit}.json"))?;
    let entries: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("no service record:\n{text}"))?;
    let word = |entry: &Value, key: &str| entry[key].as_str().unwrap_or("-").to_owned();
    for entry in &entries {
        if entry["timestamp"].as_str().is_none_or(|time| time.len() != 20) {
            bail!("a timestamp is missing or malformed:\n{text}");
        }
        if (entry["result"] == "failure") != entry["errorMessage"].is_string() {
            bail!("a failure without a message, or the other way round:\n{text}");
        }
    }
    Ok(entries.iter().map(|e| ["stage", "phase", "result"].map(|key| word(e, key)).join(" ")).collect())
}
