//! The tools that own users, files and caches, called after the switch: systemd-sysusers,
//! systemd-tmpfiles, ldconfig, udevadm, and the bus's own reload; hooks, and what an installer's
//! script says.
//!
//! Nothing of theirs is reimplemented. This is the only room that starts programs of the node image
//! on the live system; it may not mount, write `/etc` itself, or talk to PID 1.

mod hooks;
mod installer;
mod tool;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::failpoint::{self, Point};

pub use hooks::{Hook, Moment, find as find_hooks, run_hook};
pub use installer::{SCRIPT, release_image};
pub use tool::run;

/// How long one tool may take.
const LIMIT: Duration = Duration::from_secs(120);

/// One thing to do after the switch, in this order, and before PID 1 re-executes itself.
struct Step {
    /// Program and arguments.
    command: &'static [&'static str],
    /// Which paths of the node image, relative to `/usr`, make it necessary when they differ.
    inputs: &'static [&'static str],
}

const STEPS: &[Step] = &[
    // The cache lists libraries by path; programs of the node image whose libraries stand outside
    // the default directories do not start before it is rebuilt.
    Step { command: &["ldconfig"], inputs: &["lib", "lib64", "etc/ld.so.conf", "etc/ld.so.conf.d"] },
    // Users first: tmpfiles and services name them.
    Step { command: &["systemd-sysusers"], inputs: &["lib/sysusers.d"] },
    // /dev is udev's on a running system. The tool returns 65 or 73 for lines it could not apply
    // (an unknown user in somebody's fragment), which must not stop a pivot: reported, not fatal.
    Step { command: &["systemd-tmpfiles", "--create", "--exclude-prefix=/dev"], inputs: &["lib/tmpfiles.d"] },
    Step { command: &["udevadm", "control", "--reload"], inputs: &["lib/udev/rules.d"] },
];

/// Runs what the differences make necessary. A tool that fails or is missing is no reason to leave
/// the system half refreshed: all of them run, and every failure comes back as one line.
pub async fn refresh(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    let mut failures = Vec::new();
    for step in STEPS {
        if !step.inputs.iter().any(|input| differs(Path::new(input))) {
            continue;
        }
        if let Err(error) = run(step.command, LIMIT).await {
            failures.push(format!("{error:#}"));
        }
    }
    failures
}

/// Makes the running message bus read the node image's D-Bus policy and activation files. A bus
/// that is down reads them when it starts.
pub async fn reload_bus() -> Result<()> {
    failpoint::hit(Point::ReloadBus, "").context("reloading the message bus")?;
    let connection = zbus::connection::Builder::system()
        .method_timeout(Duration::from_secs(25))
        .build()
        .await
        .context("the system bus does not answer; it reads the new configuration when it starts")?;
    connection
        .call_method(
            Some("org.freedesktop.DBus"),
            "/org/freedesktop/DBus",
            Some("org.freedesktop.DBus"),
            "ReloadConfig",
            &(),
        )
        .await
        .context("the message bus refused to reload its configuration")?;
    Ok(())
}
