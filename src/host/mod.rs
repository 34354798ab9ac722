//! Runs the system's tools for policy, users, files and caches after the switch: load_policy, systemd-sysusers,
//! systemd-tmpfiles, ldconfig, update-ca-trust, systemd-hwdb, udevadm, and the message bus's reload. Also runs hooks and the installer's
//! script, and shows a text at logins.
//!
//! Only this module starts programs of the node image on the running system. It does not mount, does not write `/etc`
//! itself, and does not call PID 1. `docs/refresh.md` lists the tools and the differences that make each of them run.

mod accounts;
mod hooks;
mod installer;
mod screens;
mod selinux;
mod skeleton;
mod sysusers;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tracing::info;
use zbus::connection::Builder;

use support::failpoint::{self, Point};

pub use accounts::{AccountPlan, Accounts, AddedAccounts, plan_accounts};
pub use hooks::{Hook, Moment, find as find_hooks, run_hook};
pub use installer::{SCRIPT, release_image};
pub use screens::show_at_logins;
pub use selinux::{PolicyStep, load_policy, policy_step};
pub use support::command::run;

/// Time limit for one tool.
const LIMIT: Duration = Duration::from_secs(120);
/// Time limit for the connection to the message bus, and for its answer.
const BUS: Duration = Duration::from_secs(25);

/// A tool to run after the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Ldconfig,
    /// Runs before tmpfiles, whose lines name users.
    Sysusers,
    /// The tool exits with 65 or 73 if it could not apply a line, for example because of an unknown user.
    Tmpfiles,
    /// Entries of `/var` and `/opt` that no line of tmpfiles creates.
    Skeleton,
    /// Certificates that programs trust, on Fedora and RHEL.
    CaTrust,
    /// The same on Debian.
    CaCertificates,
    Hwdb,
    /// The new rules apply to later events. Existing devices are not triggered: that would rename interfaces and start
    /// units on the running system.
    Udev,
}

impl Tool {
    /// Returns the program with its arguments, and paths of the node image, relative to `/usr`: the tool runs if one
    /// differs. `etc/…` are the defaults: if they differ, the merge may have changed `/etc`.
    fn parts(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Ldconfig => (&["ldconfig"], &["lib64", "etc/ld.so.conf", "etc/ld.so.conf.d"]),
            Self::Sysusers => (&["systemd-sysusers"], &["lib/sysusers.d", "etc/sysusers.d"]),
            // udev manages /dev on a running system.
            Self::Tmpfiles => (
                &["systemd-tmpfiles", "--create", "--exclude-prefix=/dev"],
                &["lib/tmpfiles.d", "etc/tmpfiles.d", "share/factory"],
            ),
            Self::Skeleton => (&["systemd-tmpfiles", "--create", "-"], &["share/factory/var", "lib/opt"]),
            Self::CaTrust => (
                &["update-ca-trust", "extract"],
                &["bin/update-ca-trust", "share/pki/ca-trust-source", "etc/pki/ca-trust"],
            ),
            Self::CaCertificates => (
                &["update-ca-certificates"],
                &["sbin/update-ca-certificates", "share/ca-certificates", "etc/ca-certificates.conf"],
            ),
            Self::Hwdb => (&["systemd-hwdb", "update"], &["lib/udev/hwdb.d", "etc/udev/hwdb.d"]),
            Self::Udev => (&["udevadm", "control", "--reload"], &["lib/udev/rules.d", "etc/udev/rules.d"]),
        }
    }
}

/// Boot-time units that apply a configuration directory, true if the unit may run again on a live system, and its inputs.
const APPLIERS: &[(&str, bool, &[&str])] = &[
    // Sets all keys of all files, which reverts settings that were changed since the boot: a container runtime that
    // enabled forwarding would lose its containers' network.
    ("systemd-sysctl.service", false, &["lib/sysctl.d", "etc/sysctl.d", "etc/sysctl.conf"]),
    // Only adds modules.
    ("systemd-modules-load.service", true, &["lib/modules-load.d", "etc/modules-load.d"]),
    // Unregisters all interpreters first, also those that running containers of other architectures need.
    ("systemd-binfmt.service", false, &["lib/binfmt.d", "etc/binfmt.d"]),
];

/// Returns the boot-time units that must run again because their inputs differ. With `live`, only those that are harmless
/// to a system in use.
pub fn appliers(differs: &dyn Fn(&Path) -> bool, live: bool) -> Vec<&'static str> {
    let mut units = Vec::new();
    for (unit, harmless, inputs) in APPLIERS {
        match (first(inputs, differs), live && !harmless) {
            (Some(input), false) => {
                info!("{unit} runs again: {input} differs");
                units.push(*unit);
            }
            (Some(input), true) => info!("{unit} does not run again, though {input} differs: this system is in use"),
            (None, _) => info!("{unit} does not run again: its inputs are unchanged"),
        }
    }
    units
}

/// Updates the loader's cache if libraries differ. Must run before everything else, PID 1's re-execution included, because
/// programs may not find their libraries without it. Returns a line for each failure.
pub async fn refresh_libraries(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    run_tools(&[Tool::Ldconfig], differs).await
}

/// Runs the tools whose inputs differ, after PID 1 was re-executed. A failure does not stop the others. Returns a line for
/// each failure.
pub async fn refresh(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    let [users, files, skeleton] = [Tool::Sysusers, Tool::Tmpfiles, Tool::Skeleton];
    run_tools(&[users, files, skeleton, Tool::CaTrust, Tool::CaCertificates, Tool::Hwdb, Tool::Udev], differs).await
}

/// Runs the tools for caches, certificates and udev rules whose inputs differ, after an undo. Users and files that the refresh created
/// stay, because processes may use them. Returns a line for each failure.
pub async fn refresh_back(differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    run_tools(&[Tool::Ldconfig, Tool::CaTrust, Tool::CaCertificates, Tool::Hwdb, Tool::Udev], differs).await
}

async fn run_tools(tools: &[Tool], differs: &(dyn Fn(&Path) -> bool + Sync)) -> Vec<String> {
    let root = Path::new("/");
    let mut failures = Vec::new();
    for &tool in tools {
        let (command, _) = tool.parts();
        let shown = command.join(" ");
        let input = match due(tool, root, differs) {
            Ok(input) => input,
            Err(why) => {
                info!("{shown} is not run: {why}");
                continue;
            }
        };
        let ran = match tool {
            Tool::Skeleton => skeleton(root).await,
            Tool::Sysusers => {
                failures.extend(sysusers::apply_files(root).await);
                Ok(true)
            }
            _ => run(command, LIMIT).await.map(|_| true),
        };
        match ran {
            Ok(true) => info!("{shown} was run: {input} differs"),
            Ok(false) => info!("{shown} is not run: nothing is missing in /var and /opt"),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    failures
}

/// Returns the input that makes `tool` necessary, or the reason to skip it.
fn due(tool: Tool, root: &Path, differs: &dyn Fn(&Path) -> bool) -> Result<String, &'static str> {
    let library = || match tool {
        Tool::Ldconfig => libraries(root).into_iter().find(|path| differs(Path::new(path))),
        _ => None,
    };
    let input = first(tool.parts().1, differs).or_else(library).ok_or("its inputs are unchanged")?;
    if tool == Tool::Hwdb && !hwdb_is_stale(root) {
        return Err("the node image brings its own database");
    }
    if matches!(tool, Tool::CaTrust | Tool::CaCertificates) {
        let program = tool.parts().0[0];
        if !["bin", "sbin"].iter().any(|dir| root.join("usr").join(dir).join(program).exists()) {
            return Err("the system has no such tool");
        }
        // Without them, the bundles are those of the image.
        if !has_own_certificates(root) {
            return Err("the machine has no private certificates");
        }
    }
    Ok(input)
}

/// Returns true if an administrator added or blocked certificates.
fn has_own_certificates(root: &Path) -> bool {
    const PLACES: [&str; 4] = [
        "etc/pki/ca-trust/source/anchors",
        "etc/pki/ca-trust/source/blocklist",
        "etc/pki/ca-trust/source/blacklist",
        "usr/local/share/ca-certificates",
    ];
    PLACES.iter().any(|place| std::fs::read_dir(root.join(place)).is_ok_and(|mut entries| entries.next().is_some()))
}

/// Returns the first input that differs.
fn first(inputs: &[&str], differs: &dyn Fn(&Path) -> bool) -> Option<String> {
    inputs.iter().find(|input| differs(Path::new(input))).map(|input| (*input).to_owned())
}

/// Returns the loader's paths in `/usr/lib`: the directory of each architecture, and single libraries.
fn libraries(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("usr/lib")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.contains("-linux-gnu") || name.contains(".so")).map(|name| format!("lib/{name}")).collect()
}

/// Returns true if the hardware database must be compiled on this machine: the one in `/etc` hides the image's, or the
/// image has none.
fn hwdb_is_stale(root: &Path) -> bool {
    root.join("etc/udev/hwdb.bin").exists() || !root.join("usr/lib/udev/hwdb.bin").exists()
}

/// Updates `/var` and `/opt`. Returns true if there was anything to do.
async fn skeleton(root: &Path) -> Result<bool> {
    let lines = skeleton::lines(root).context("cannot list the missing entries of /var and /opt")?;
    let mut created = Ok(Vec::new());
    if !lines.is_empty() {
        for line in &lines {
            info!("tmpfiles: {line}");
        }
        let text = lines.join("\n") + "\n";
        created = support::command::run_with_input(Tool::Skeleton.parts().0, text.as_bytes(), LIMIT).await;
    }
    // After tmpfiles, because a line of the image may have created such a link.
    let removed = skeleton::remove_dangling(root).context("cannot remove dangling links in /opt")?;
    for link in &removed {
        info!("removed {}: the node image lacks its target", link.display());
    }
    created.map(|_| !lines.is_empty() || !removed.is_empty())
}

/// Makes the running message bus read its policy and activation files again.
///
/// # Errors
/// The bus does not answer within 25 s, or refuses. A bus that is not running reads the files when it starts.
pub async fn reload_bus() -> Result<()> {
    failpoint::hit(Point::ReloadBus, "").context("cannot reload the message bus")?;
    reload(Builder::system(), BUS).await
}

/// Connects and calls ReloadConfig, each within `limit`. zbus limits only the call, and dbus.socket accepts connections for
/// a bus that hangs.
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
    fn boot_time_units_run_again_if_inputs_differ_and_live_allows_it() {
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
    fn inputs_are_those_of_the_documentation() {
        let row = |line: &'static str| {
            let (name, inputs) = line.strip_prefix("| ")?.split_once(" | ")?;
            let inputs = inputs.split(" | ").next()?.split('`').skip(1).step_by(2);
            Some((name.trim_matches('`'), Vec::from_iter(inputs.filter(|input| !input.contains('*')))))
        };
        let rows: std::collections::BTreeMap<_, _> =
            include_str!("../../docs/refresh.md").lines().filter_map(row).collect();
        let [users, files] = [Tool::Sysusers, Tool::Tmpfiles];
        for tool in [Tool::Ldconfig, users, files, Tool::CaTrust, Tool::CaCertificates, Tool::Hwdb, Tool::Udev] {
            let (command, expected) = tool.parts();
            let command = command.join(" ");
            let row = rows.iter().find(|(name, _)| command.starts_with(*name));
            assert_eq!(row.map(|(_, inputs)| inputs.as_slice()), Some(expected), "{command}");
        }
        assert_eq!(rows["/var` and `/opt`, see below"], Tool::Skeleton.parts().1);
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
    fn a_tool_is_due_if_an_input_differs() {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "usr/lib/libx.so.1");
        let because = |tool, input: &'static str| due(tool, temp.path(), &|path| path == Path::new(input));
        let unchanged = Err("its inputs are unchanged");
        for (tool, input) in [
            (Tool::Ldconfig, "etc/ld.so.conf"),
            (Tool::Ldconfig, "lib/libx.so.1"),
            (Tool::Sysusers, "lib/sysusers.d"),
            (Tool::Tmpfiles, "etc/tmpfiles.d"),
            (Tool::Hwdb, "lib/udev/hwdb.d"),
        ] {
            assert_eq!(because(tool, input), Ok(input.to_owned()));
        }
        assert_eq!(because(Tool::Ldconfig, "lib/os-release"), unchanged);
        assert_eq!(because(Tool::Tmpfiles, "lib/libx.so.1"), unchanged);
        put(temp.path(), "usr/lib/udev/hwdb.bin");
        assert_eq!(because(Tool::Hwdb, "lib/udev/hwdb.d"), Err("the node image brings its own database"));
        assert_eq!(because(Tool::Hwdb, "lib/libx.so.1"), unchanged);
        assert!(because(Tool::Udev, "lib/udev/rules.d").is_ok());
    }

    #[test]
    fn bundles_are_generated_if_the_machine_has_its_own_certificates() {
        for (tool, program, input, anchor) in [
            (
                Tool::CaTrust,
                "bin/update-ca-trust",
                "share/pki/ca-trust-source",
                "etc/pki/ca-trust/source/anchors/a.pem",
            ),
            (Tool::CaTrust, "bin/update-ca-trust", "bin/update-ca-trust", "etc/pki/ca-trust/source/blocklist/a.pem"),
            (
                Tool::CaCertificates,
                "sbin/update-ca-certificates",
                "etc/ca-certificates.conf",
                "usr/local/share/ca-certificates/a.crt",
            ),
        ] {
            let temp = tempfile::tempdir().unwrap();
            let because = |input: &'static str| due(tool, temp.path(), &|path| path == Path::new(input));
            assert_eq!(because(input), Err("the system has no such tool"));
            put(temp.path(), &format!("usr/{program}"));
            assert_eq!(because(input), Err("the machine has no private certificates"));
            put(temp.path(), anchor);
            assert_eq!(because(input), Ok(input.to_owned()));
            assert_eq!(because("lib/os-release"), Err("its inputs are unchanged"));
        }
    }

    /// Tests only the part that needs no tool: systemd-tmpfiles would change this system's `/var`.
    #[tokio::test]
    async fn removing_a_dangling_link_counts_as_a_change() {
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
        assert!(hwdb_is_stale(temp.path()), "without a database");
        put(temp.path(), "usr/lib/udev/hwdb.bin");
        assert!(!hwdb_is_stale(temp.path()));
        put(temp.path(), "etc/udev/hwdb.bin");
        assert!(hwdb_is_stale(temp.path()));
    }

    #[test]
    fn libraries_are_found_by_name() {
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
