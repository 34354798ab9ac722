//! The tools that own policy, users, files and caches, called after the switch: load_policy, systemd-sysusers,
//! systemd-tmpfiles, ldconfig, systemd-hwdb, udevadm, and the bus's own reload; hooks, and what an installer's
//! script says.
//!
//! Nothing of theirs is reimplemented. This is the only room that starts programs of the node image
//! on the live system; it may not mount, write `/etc` itself, or talk to PID 1. `docs/refresh.md` says what is run
//! when.

mod accounts;
mod hooks;
mod installer;
mod selinux;
mod skeleton;
mod sysusers;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tracing::info;
use zbus::connection::Builder;

use support::failpoint::{self, Point};

pub use accounts::{AccountPlan, Accounts, plan_accounts};
pub use hooks::{Hook, Moment, find as find_hooks, run_hook};
pub use installer::{SCRIPT, release_image};
pub use selinux::{PolicyStep, load_policy, policy_step};
pub use support::command::run;

/// How long one tool may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the message bus may take to let us in, and to answer.
const BUS: Duration = Duration::from_secs(25);

/// One thing to do after the switch.
struct Step {
    /// Program and arguments.
    command: &'static [&'static str],
    /// Which paths of the node image, relative to `/usr`, make it necessary when they differ. `etc/...` are the defaults:
    /// where they differ, the merge may have changed `/etc`.
    inputs: &'static [&'static str],
}

const LDCONFIG: Step = Step { command: &["ldconfig"], inputs: &["lib64", "etc/ld.so.conf", "etc/ld.so.conf.d"] };
// Users first: tmpfiles and services name them.
const SYSUSERS: Step = Step { command: &["systemd-sysusers"], inputs: &["lib/sysusers.d", "etc/sysusers.d"] };
// /dev is udev's on a running system. The tool returns 65 or 73 for lines it could not apply
// (an unknown user in somebody's fragment), which must not stop a pivot: reported, not fatal.
const TMPFILES: Step = Step {
    command: &["systemd-tmpfiles", "--create", "--exclude-prefix=/dev"],
    inputs: &["lib/tmpfiles.d", "etc/tmpfiles.d", "share/factory"],
};
const SKELETON: Step =
    Step { command: &["systemd-tmpfiles", "--create", "-"], inputs: &["share/factory/var", "lib/opt"] };
const HWDB: Step = Step { command: &["systemd-hwdb", "update"], inputs: &["lib/udev/hwdb.d", "etc/udev/hwdb.d"] };
// New rules hold for events from now on. Devices that are there are not triggered: that would rename
// interfaces and start units under what runs.
const UDEV: Step =
    Step { command: &["udevadm", "control", "--reload"], inputs: &["lib/udev/rules.d", "etc/udev/rules.d"] };

/// What applies files of a directory at boot, as a unit of systemd's, and whether it may run on a system that has
/// long booted.
const APPLIERS: &[(&str, bool, &[&str])] = &[
    // Sets all keys of all files anew, and so takes back what was tuned since the boot; a runtime that turned
    // forwarding on for its containers would lose their network.
    ("systemd-sysctl.service", false, &["lib/sysctl.d", "etc/sysctl.d", "etc/sysctl.conf"]),
    // Adds modules, takes nothing away.
    ("systemd-modules-load.service", true, &["lib/modules-load.d", "etc/modules-load.d"]),
    // Unregisters everything first, also the interpreters that containers of other architectures run on.
    ("systemd-binfmt.service", false, &["lib/binfmt.d", "etc/binfmt.d"]),
];

/// Units that are to run again because what they apply differs. `live`: on a system that has long booted, only
/// those that take nothing from what runs.
pub fn appliers(differs: &dyn Fn(&Path) -> bool, live: bool) -> Vec<&'static str> {
    let mut units = Vec::new();
    for (unit, harmless, inputs) in APPLIERS {
        match (first(inputs, differs), live && !harmless) {
            (Some(input), false) => {
                info!("{unit} runs again: {input} differs");
                units.push(*unit);
            }
            (Some(input), true) => info!("{unit} does not run again, though {input} differs: this system is in use"),
            (None, _) => info!("{unit} does not run again: its inputs are as they were"),
        }
    }
    units
}

/// The loader's cache, without which programs may not find their libraries: before everything else, PID 1's
/// re-execution included. Returns as [`refresh`] does.
pub async fn refresh_libraries(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    run_steps(&[&LDCONFIG], differs).await
}

/// Runs what the differences make necessary, when PID 1 is the node image's. A tool that fails or is missing is no reason
/// to leave the system half refreshed: all of them run, and every failure comes back as one line.
pub async fn refresh(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    run_steps(&[&SYSUSERS, &TMPFILES, &SKELETON, &HWDB, &UDEV], differs).await
}

/// The same on the way back, where only caches have to follow: users and files that were made stay, somebody may use
/// them.
pub async fn refresh_back(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    run_steps(&[&LDCONFIG, &HWDB, &UDEV], differs).await
}

async fn run_steps(steps: &[&Step], differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    let root = Path::new("/");
    let mut failures = Vec::new();
    for step in steps {
        let shown = step.command.join(" ");
        let input = match due(step, root, differs) {
            Ok(input) => input,
            Err(why) => {
                info!("{shown} is not run: {why}");
                continue;
            }
        };
        let ran = match step.command {
            command if command == SKELETON.command => skeleton(root).await,
            command if command == SYSUSERS.command => {
                failures.extend(sysusers::apply_files(root).await);
                Ok(true)
            }
            command => run(command, LIMIT).await.map(|_| true),
        };
        match ran {
            Ok(true) => info!("{shown} was run: {input} differs"),
            Ok(false) => info!("{shown} is not run: nothing is missing in /var and /opt"),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    failures
}

/// The input that makes `step` necessary, or why it is not.
fn due(step: &Step, root: &Path, differs: &dyn Fn(&Path) -> bool) -> Result<String, &'static str> {
    let library = || match step.command {
        ["ldconfig"] => libraries(root).into_iter().find(|path| differs(Path::new(path))),
        _ => None,
    };
    let input = first(step.inputs, differs).or_else(library).ok_or("its inputs are as they were")?;
    if step.command == HWDB.command && !hwdb_is_stale(root) {
        return Err("the node image brings its own database");
    }
    Ok(input)
}

/// The first input that differs.
fn first(inputs: &[&str], differs: &dyn Fn(&Path) -> bool) -> Option<String> {
    inputs.iter().find(|input| differs(Path::new(input))).map(|input| (*input).to_owned())
}

/// What in `/usr/lib` is for the loader: the directory of each architecture, and libraries beside them.
fn libraries(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("usr/lib")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.contains("-linux-gnu") || name.contains(".so")).map(|name| format!("lib/{name}")).collect()
}

/// Whether the database of hardware has to be made here. The one in `/etc`, if there is one, hides the image's;
/// where there is none, the image's own is as new as its files.
fn hwdb_is_stale(root: &Path) -> bool {
    root.join("etc/udev/hwdb.bin").exists() || !root.join("usr/lib/udev/hwdb.bin").exists()
}

/// `/var` and `/opt`; whether there was anything to do.
async fn skeleton(root: &Path) -> Result<bool> {
    let lines = skeleton::lines(root).context("looking for what /var and /opt lack")?;
    let mut made = Ok(Vec::new());
    if !lines.is_empty() {
        for line in &lines {
            info!("tmpfiles: {line}");
        }
        let text = lines.join("\n") + "\n";
        made = support::command::run_with_input(SKELETON.command, text.as_bytes(), LIMIT).await;
    }
    // After it: a line of the image's own may have made one.
    let removed = skeleton::remove_dangling(root).context("removing links in /opt to what is gone")?;
    for link in &removed {
        info!("{}: removed, the node image does not have what it pointed to", link.display());
    }
    made.map(|_| !lines.is_empty() || !removed.is_empty())
}

/// Makes the running message bus read the D-Bus policy and activation files that are in place now. A bus
/// that is down reads them when it starts.
pub async fn reload_bus() -> Result<()> {
    failpoint::hit(Point::ReloadBus, "").context("reloading the message bus")?;
    reload(Builder::system(), BUS).await
}

/// `limit`: for connecting, and for the answer. zbus limits calls only, and dbus.socket takes connections for a bus that
/// hangs.
async fn reload(bus: Builder<'_>, limit: Duration) -> Result<()> {
    let connection = tokio::time::timeout(limit, bus.method_timeout(limit).build())
        .await
        .map_err(anyhow::Error::from)
        .and_then(|built| built.map_err(anyhow::Error::from))
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn appliers_by_what_differs_and_by_who_is_there() {
        let all = |_: &Path| true;
        let none = |_: &Path| false;
        let merged = |path: &Path| path == Path::new("etc/sysctl.d");
        assert_eq!(appliers(&none, false), [""; 0]);
        assert_eq!(appliers(&merged, false), ["systemd-sysctl.service"]);
        assert_eq!(appliers(&merged, true), [""; 0]);
        assert_eq!(appliers(&all, false).len(), 3);
        assert_eq!(appliers(&all, true), ["systemd-modules-load.service"]);
    }

    #[test]
    fn inputs_are_the_documents() {
        let row = |line: &'static str| {
            let (name, inputs) = line.strip_prefix("| ")?.split_once(" | ")?;
            let inputs = inputs.split(" | ").next()?.split('`').skip(1).step_by(2);
            Some((name.trim_matches('`'), Vec::from_iter(inputs.filter(|input| !input.contains('*')))))
        };
        let rows: std::collections::BTreeMap<_, _> =
            include_str!("../../docs/refresh.md").lines().filter_map(row).collect();
        for step in [LDCONFIG, SYSUSERS, TMPFILES, HWDB, UDEV] {
            let command = step.command.join(" ");
            let row = rows.iter().find(|(name, _)| command.starts_with(*name));
            assert_eq!(row.map(|(_, inputs)| inputs.as_slice()), Some(step.inputs), "{command}");
        }
        assert_eq!(rows["/var` and `/opt`, see below"], SKELETON.inputs);
        for (unit, _, inputs) in APPLIERS {
            assert_eq!(rows[unit], *inputs, "{unit}");
        }
    }

    fn put(root: &Path, path: &str) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }

    #[test]
    fn what_is_due() {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "usr/lib/libx.so.1");
        let because = |step: &Step, input: &'static str| due(step, temp.path(), &|path| path == Path::new(input));
        let unchanged = Err("its inputs are as they were");
        for (step, input) in [
            (&LDCONFIG, "etc/ld.so.conf"),
            (&LDCONFIG, "lib/libx.so.1"),
            (&SYSUSERS, "lib/sysusers.d"),
            (&TMPFILES, "etc/tmpfiles.d"),
            (&HWDB, "lib/udev/hwdb.d"),
        ] {
            assert_eq!(because(step, input), Ok(input.to_owned()));
        }
        assert_eq!(because(&LDCONFIG, "lib/os-release"), unchanged);
        assert_eq!(because(&TMPFILES, "lib/libx.so.1"), unchanged);
        put(temp.path(), "usr/lib/udev/hwdb.bin");
        assert_eq!(because(&HWDB, "lib/udev/hwdb.d"), Err("the node image brings its own database"));
        assert_eq!(because(&HWDB, "lib/libx.so.1"), unchanged);
        assert!(because(&UDEV, "lib/udev/rules.d").is_ok());
    }

    /// Only what needs no tool: that would work on this system's `/var`.
    #[tokio::test]
    async fn a_link_that_is_removed_is_something_done() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("opt/gone");
        std::fs::create_dir(temp.path().join("opt")).unwrap();
        assert!(!skeleton(temp.path()).await.unwrap());
        std::os::unix::fs::symlink("../usr/lib/opt/gone", &link).unwrap();
        assert!(skeleton(temp.path()).await.unwrap());
        assert!(!link.is_symlink());
    }

    #[test]
    fn the_database_in_etc_hides_the_images() {
        let temp = tempfile::tempdir().unwrap();
        assert!(hwdb_is_stale(temp.path()), "there is none");
        put(temp.path(), "usr/lib/udev/hwdb.bin");
        assert!(!hwdb_is_stale(temp.path()));
        put(temp.path(), "etc/udev/hwdb.bin");
        assert!(hwdb_is_stale(temp.path()));
    }

    #[test]
    fn what_the_loader_looks_at() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["x86_64-linux-gnu", "systemd", "libx.so.1", "os-release"] {
            std::fs::create_dir_all(temp.path().join("usr/lib").join(name)).unwrap();
        }
        let mut found = libraries(temp.path());
        found.sort();
        assert_eq!(found, ["lib/libx.so.1", "lib/x86_64-linux-gnu"]);
    }

    #[tokio::test]
    async fn a_bus_that_never_answers_is_not_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().join("bus");
        let _hangs = tokio::net::UnixListener::bind(&socket).unwrap();
        let bus = || Builder::address(format!("unix:path={}", socket.display()).as_str());
        let reloaded = tokio::time::timeout(Duration::from_secs(60), reload(bus(), Duration::from_millis(200)));
        let error = reloaded.await.unwrap().unwrap_err();
        assert!(error.to_string().starts_with("the system bus does not answer"), "{error:#}");
    }
}
