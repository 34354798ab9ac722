//! What a pivoted system must look like: the same questions for machines and containers.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::check::{Checks, contains, contains_any, same};
use crate::files::Files;
use crate::guest::Guest;
use crate::images::Image;
use crate::proc::wait_for;
use crate::registry::registries_conf;

/// What tells the two node images apart.
pub struct Expected<'a> {
    /// The image.
    pub image: &'a Image,
    /// Start of `systemctl --version`.
    pub systemd: &'a str,
    /// Name of the system in the new /usr.
    pub os: &'a str,
    /// Start of `ssh -V`.
    pub ssh: &'a str,
}

impl<'a> Expected<'a> {
    /// Debian 13 over Debian 12.
    pub fn node_a(image: &'a Image) -> Self {
        Expected { image, systemd: "systemd 257", os: "Debian GNU/Linux 13", ssh: "OpenSSH_10" }
    }

    /// Debian 12 with newer, more and fewer packages.
    pub fn node_b(image: &'a Image) -> Self {
        Expected { image, systemd: "systemd 252", os: "Debian GNU/Linux 12", ssh: "OpenSSH_9.2" }
    }
}

/// What an administrator (or Ignition) brings along: the node image to become, the mirror, own changes in /etc.
pub fn node_files(files: &Files, image: &str, mirror_host: &str, mirror_port: u16) -> Result<()> {
    files.put("/etc/node-image-pivot.conf.d/50-testbed.toml", 0o644, &format!("image = \"{image}\"\n"))?;
    files.put(
        "/etc/containers/registries.conf.d/50-testbed.conf",
        0o644,
        &registries_conf(mirror_host, mirror_port),
    )?;
    files.put("/var/roothome/.docker/config.json", 0o600, "{\"auths\": {}}\n")?;
    files.put("/etc/base-tool/admin-edited.conf", 0o644, "edited by the administrator\n")?;
    files.put("/etc/base-tool/admin-added.conf", 0o644, "added by the administrator\n")?;
    // Removed at boot, before any pivot.
    files.put("/etc/tmpfiles.d/testbed.conf", 0o644, "r /etc/base-tool/admin-removed.conf\n")
}

/// What is compared with afterwards.
pub struct Before {
    boot_id: String,
    modules: String,
}

impl Before {
    /// Ask it while the base system is still what runs.
    pub fn of(guest: &dyn Guest) -> Result<Self> {
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        Ok(Before { boot_id: guest.ask("cat /proc/sys/kernel/random/boot_id")?, modules: modules(guest)? })
    }
}

fn modules(guest: &dyn Guest) -> Result<String> {
    // A container has the kernel of the machine it runs on, and no modules for it.
    if guest.has_own_kernel() {
        guest.ask("sha256sum /usr/lib/modules/$(uname -r)/modules.dep")
    } else {
        Ok(String::new())
    }
}

/// Wait for the end of the pivot, whichever it is; shows progress.
pub fn wait_pivoted(guest: &dyn Guest, checks: &Checks, limit: Duration) -> Result<()> {
    let mut last = String::new();
    wait_for("the pivot's end", limit, || {
        let Ok(status) = guest.status() else { return Ok(false) };
        let now = format!("{} {}", status["state"].as_str().unwrap_or("?"), status["phase"].as_str().unwrap_or(""));
        if now != last {
            checks.note(&format!("state: {now}"));
            last = now;
        }
        if status["state"] == "failed" {
            return Ok(true);
        }
        Ok(guest.unit("node-image-finish.service", "ActiveState")? == "active"
            && guest.unit("multi-user.target", "ActiveState")? == "active"
            && guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0")
    })?;
    if last.starts_with("failed") {
        bail!(
            "the pivot failed:\n{}",
            guest.run("node-image-pivot status; systemctl status --no-pager 'node-image-*'")?.text
        );
    }
    Ok(())
}

/// Every assertion about a system that has become its node image. `isolated`: the bootstrap flow.
pub fn pivoted(guest: &dyn Guest, before: &Before, expected: &Expected<'_>, checks: &mut Checks) {
    checks.check("no reboot: the boot id is the same", || {
        same(guest.ask("cat /proc/sys/kernel/random/boot_id")?, before.boot_id.clone())
    });
    new_programs(guest, expected, checks);
    services(guest, expected, checks);
    removed(guest, checks);
    if guest.has_own_kernel() {
        kernel(guest, before, checks);
    }
    etc(guest, checks);
    whole(guest, expected, checks);
    again(guest, checks);
}

fn new_programs(guest: &dyn Guest, expected: &Expected<'_>, checks: &mut Checks) {
    checks.check("/usr is the node image's", || contains(&guest.ask("cat /usr/lib/os-release")?, expected.os));
    checks.check("/usr is an overlay and cannot be written", || {
        contains(&guest.ask("findmnt -n -o FSTYPE,OPTIONS --target /usr/bin | tail -n 1")?, "overlay")?;
        same(guest.run("touch /usr/x")?.status, 1)
    });
    checks.check("new: oc runs and reaches the node agent", || {
        contains(&guest.ask("oc version")?, "Server Version: 4.99.0")
    });
    checks.check("new: kubectl runs", || contains(&guest.ask("kubectl version --client 2>&1")?, "lient"));
    checks.check("new: the container runtime answers its CLI", || contains(&guest.ask("ctr version")?, "Server:"));
    checks.check("newer: base-tool 2.0", || same(guest.ask("base-tool")?, "base-tool 2.0".into()));
    checks.check("newer: the installed systemd", || contains(&guest.ask("systemctl --version")?, expected.systemd));
    checks.check("newer: PID 1 is the installed systemd", || {
        contains(
            expected.systemd,
            guest.ask("systemctl show --property=Version --value | cut -d. -f1 | cut -d' ' -f1")?.as_str(),
        )
    });
    checks.check("a file became a directory", || guest.ask("test -f /usr/lib/base-tool/becomes-dir/file").map(drop));
}

fn services(guest: &dyn Guest, expected: &Expected<'_>, checks: &mut Checks) {
    for unit in ["containerd.service", "kubelet.service", "node-hello.service"] {
        checks.check(&format!("{unit} of the node image is active"), || {
            same(guest.unit(unit, "ActiveState")?, "active".into())
        });
    }
    checks.check("node-hello answers, as the user that the node image's sysusers made", || {
        contains(&guest.ask("curl -fsS http://127.0.0.1:8080/")?, expected.os)?;
        same(
            guest.ask("stat -c %U /proc/$(systemctl show -p MainPID --value node-hello.service)")?,
            "kubelet-svc".into(),
        )
    });
    checks.check("the node image's tmpfiles are there", || {
        same(guest.ask("stat -c %U /run/kubelet-svc/created-by-tmpfiles")?, "kubelet-svc".into())
    });
}

fn removed(guest: &dyn Guest, checks: &mut Checks) {
    for path in ["/usr/bin/base-legacy", "/usr/lib/base-tool/only-in-1", "/usr/bin/nc.openbsd"] {
        checks.check(&format!("removed: {path}"), || guest.ask(&format!("test ! -e {path}")).map(drop));
    }
    checks.check("removed: the service that only the bootimage had does not run", || {
        same(guest.unit("base-legacy.service", "ActiveState")?, "inactive".into())
    });
}

fn kernel(guest: &dyn Guest, before: &Before, checks: &mut Checks) {
    checks.check("/usr/lib/modules/$(uname -r) is the booted one", || same(modules(guest)?, before.modules.clone()));
    checks.check("a module that was not loaded loads", || {
        guest.ask("! grep -q ^vxlan /proc/modules && modprobe vxlan && grep -q ^vxlan /proc/modules").map(drop)
    });
    checks.check("the node image's modules-load.d was applied", || guest.ask("grep -q ^dummy /proc/modules").map(drop));
}

fn etc(guest: &dyn Guest, checks: &mut Checks) {
    let file = |name: &str| guest.ask(&format!("cat /etc/base-tool/{name}"));
    let absent = |name: &str| guest.ask(&format!("test ! -e /etc/{name}")).map(drop);
    checks.check("/etc: what the administrator changed is kept", || {
        same(file("admin-edited.conf")?, "edited by the administrator".into())
    });
    checks.check("/etc: what the administrator added is kept", || {
        same(file("admin-added.conf")?, "added by the administrator".into())
    });
    checks.check("/etc: what the administrator deleted stays deleted", || absent("base-tool/admin-removed.conf"));
    checks.check("/etc: a new default arrives", || same(file("new-default.conf")?, "arrives".into()));
    checks.check("/etc: a changed default is taken over", || {
        same(file("changed-default.conf")?, "default of 2.0".into())
    });
    checks.check("/etc: a default that is gone goes", || {
        absent("base-tool/removed-default.conf")?;
        absent("base-legacy.conf")
    });
    checks.check("/etc: root's password and the machine's id are as before", || {
        guest.ask("grep -q '^root:.6.testbed' /etc/shadow && journalctl -q -n 1 -b -o json | jq -er ._MACHINE_ID | grep -qxFf /etc/machine-id").map(drop)
    });
}

fn whole(guest: &dyn Guest, expected: &Expected<'_>, checks: &mut Checks) {
    checks.check("a fresh ssh login works, to the new sshd", || {
        contains(&guest.login("ssh -V 2>&1; id -un")?.text, expected.ssh)
    });
    checks.check("the user manager of that login has not failed", || {
        contains_any(
            &guest.login("systemctl is-active user@0.service; loginctl --no-legend list-sessions")?.text,
            &["active"],
        )
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.check("systemd says: running", || {
        same(guest.run("systemctl is-system-running --wait")?.text.trim().into(), "running".to_string())
    });
    checks.check("our units ended well", || {
        for unit in ["node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"] {
            same(
                format!("{unit} {} {}", guest.unit(unit, "ActiveState")?, guest.unit(unit, "Result")?),
                format!("{unit} active success"),
            )?;
        }
        Ok(())
    });
    checks.check("the default target is not ours any more", || {
        same(guest.ask("systemctl get-default")?, "multi-user.target".into())?;
        guest.ask("! readlink /run/systemd/generator.early/default.target | grep node-image").map(drop)
    });
    checks.check("status --json tells the whole story", || {
        let status = guest.status()?;
        same(status["schema"].as_i64(), Some(1))?;
        same(status["state"].as_str(), Some("done"))?;
        same(status["digest"].as_str(), Some(expected.image.digest.as_str()))?;
        same(status["commit"].as_str(), expected.image.commit.as_deref())?;
        let phases: Vec<_> =
            status["timeline"].as_array().into_iter().flatten().filter_map(|p| p["phase"].as_str()).collect();
        same(phases, vec!["resolve", "pull", "stage", "switch", "refresh", "finish"])?;
        if status["cost"]["bytes_fetched"].as_u64().is_none_or(|n| n == 0) {
            bail!("no cost: {status}");
        }
        Ok(())
    });
}

fn again(guest: &dyn Guest, checks: &mut Checks) {
    checks.check("a second run has nothing to do", || {
        let mounts = guest.ask("grep -c . /proc/self/mountinfo")?;
        let answer = guest.run("node-image-pivot run")?;
        same(answer.status, 0)?;
        contains_any(&answer.text, &["nothing to do", "the pivot is done"])?;
        same(guest.ask("grep -c . /proc/self/mountinfo")?, mounts)
    });
    checks.check("a daemon-reload does not arm it again", || {
        guest.ask("systemctl daemon-reload")?;
        same(guest.ask("systemctl get-default")?, "multi-user.target".into())
    });
}

/// A system that was left alone: base system, normal target, none of our units at work.
pub fn left_alone(guest: &dyn Guest, checks: &mut Checks) {
    checks.check("left alone: multi-user is reached", || {
        guest.wait_unit("multi-user.target", "active", Duration::from_secs(120))
    });
    checks.check("left alone: no unit of ours ran", || {
        for unit in ["node-image-pull.service", "node-image-overlay.service", "node-image-pivot.target"] {
            same(format!("{unit} {}", guest.unit(unit, "ActiveState")?), format!("{unit} inactive"))?;
        }
        Ok(())
    });
    checks.check("left alone: /usr is the base system's", || same(guest.ask("base-tool")?, "base-tool 1.0".into()));
    checks.check("left alone: no unit has failed", || {
        same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
    });
}

/// The registry cannot be reached: the machine waits in the pivot target and says why, wherever one looks.
pub fn waits_and_says_why(guest: &dyn Guest, checks: &mut Checks) {
    // The mirror refuses the connection, and the registry behind it exists in no DNS.
    let why = ["refused", "lookup", "resolution", "unreachable", "resolve host", "no such host"];
    checks.check("registry down: the state is waiting, with a reason and a next attempt", || {
        wait_for("state waiting", Duration::from_secs(120), || Ok(guest.status()?["error"]["message"].is_string()))?;
        let status = guest.status()?;
        contains_any(status["error"]["message"].as_str().unwrap_or_default(), &why)?;
        if status["error"]["next_retry_unix"].as_f64().is_none() && status["state"] == "waiting" {
            bail!("no next attempt: {status}");
        }
        Ok(())
    });
    checks.check("registry down: it stays in the pivot target", || {
        // A target is inactive until everything it wants is through; its job says that it is on the way.
        contains(&guest.ask("systemctl list-jobs --no-legend")?, "node-image-pivot.target")?;
        contains(&guest.ask("readlink /run/systemd/generator.early/default.target")?, "node-image-pivot.target")?;
        same(guest.unit("node-image-pull.service", "ActiveState")?, "activating".into())?;
        same(guest.unit("multi-user.target", "ActiveState")?, "inactive".into())
    });
    checks.check("registry down: systemctl status says why", || {
        // The unit asks the agent twice a second, and is told a moment later than we are.
        wait_for("the reason in systemctl status", Duration::from_secs(60), || {
            contains_any(&guest.run("systemctl status --no-pager -l node-image-pull.service")?.text, &why)
                .map(|()| true)
        })
    });
    checks.check("registry down: the console says why", || {
        wait_for("the reason on the console", Duration::from_secs(60), || {
            contains_any(&guest.console(), &why).map(|()| true)
        })
    });
}
