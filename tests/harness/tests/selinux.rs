//! Issue 5, item 4 on a real machine: SELinux is enforcing throughout, and the node image's policy has types that the
//! bootimage's lacks.
//! `cargo test -p testbed --test selinux -- --nocapture`

use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{node_files, wait_pivoted};
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(240);
const PIVOT: Duration = Duration::from_secs(420);
const KARGS: [&str; 4] = ["security=selinux", "selinux=1", "enforcing=1", "audit=1"];

/// Whether the policy that is loaded knows a context: the kernel says so.
fn knows(guest: &Vm, context: &str) -> Result<bool> {
    Ok(guest.run(&format!("printf %s {context} >/sys/fs/selinux/context"))?.status == 0)
}

/// The label of a path, without its level.
fn label(guest: &Vm, path: &str) -> Result<String> {
    guest.ask(&format!("stat -c %C {path} | cut -d: -f1-3"))
}

/// What was denied, one line for each.
fn denials(guest: &Vm) -> Result<String> {
    guest.ask("journalctl -b -o cat | grep -a 'avc: *denied' || true")
}

/// Runs the agent in the domain of any script: it may do all that root may, except write labels that nobody knows.
const OTHER_DOMAIN: &str = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'exec /usr/bin/node-image-pivot daemon'\n";
const DROP_IN: &str = "/etc/systemd/system/node-image-pivotd.service.d/50-other-domain.conf";

#[test]
fn enforcing_with_types_that_only_the_node_image_knows() -> Result<()> {
    let images = Images::ensure()?;
    let (boot, storage, image) = images.selinux()?;
    let mut checks =
        Checks::new("machine: SELinux enforcing, the node image's policy has types that the loaded one lacks");
    let registry = Registry::start(&storage, &work_dir("vm-selinux-registry")?, None, None)?;
    let limit = Duration::from_secs(900);
    let setup =
        vm::Setup { name: "vm-selinux", boot: &boot, disk: None, kargs: &KARGS, memory_mib: 3072, cpu: vm::CPU, limit };
    let guest = Vm::start(images, &setup, |files| {
        files.put(DROP_IN, 0o644, OTHER_DOMAIN)?;
        node_files(files, &image.by_digest(), vm::HOST, registry.port)
    })?;
    if !checks.check("ssh answers", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    refused_in_another_domain(&guest, &mut checks);
    let goes_on = checks.check("in its own domain, it becomes the node image", || {
        guest
            .ask(&format!("rm {DROP_IN} && systemctl daemon-reload && systemctl restart node-image-pivotd.service"))?;
        guest.ask("systemctl start --no-block node-image-finish.service")?;
        wait_for("another attempt", Duration::from_secs(30), || Ok(guest.status()?["state"] != "failed"))?;
        wait_pivoted(&guest, &Checks::new("progress"), PIVOT)
    });
    if goes_on {
        labelled(&guest, &mut checks);
        runs(&guest, &mut checks);
        undone(&guest, &mut checks);
    }
    enforced(&guest, &mut checks);
    checks.finish()
}

fn refused_in_another_domain(guest: &Vm, checks: &mut Checks) {
    checks.check("before: enforcing, and the loaded policy lacks nodeapp's types", || {
        same(guest.ask("getenforce")?, "Enforcing".into())?;
        same(knows(guest, "system_u:object_r:nodeapp_exec_t:s0")?, false)?;
        same(knows(guest, "system_u:object_r:etc_t:s0")?, true)
    });
    checks.check("in another domain it stops before the switch, says in which it runs and what to do", || {
        wait_for("the refusal", Duration::from_secs(180), || Ok(guest.status()?["state"] == "failed"))?;
        let status = guest.status()?;
        let said = status["error"]["message"].as_str().unwrap_or_default().to_owned();
        for words in ["nodeapp_", "domain initrc_t", "mac_admin", "install_exec_t", "docs/selinux.md"] {
            contains(&said, words)?;
        }
        contains(&guest.run("systemctl status --no-pager -l node-image-pull.service")?.text, "domain initrc_t")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())
    });
}

fn labelled(guest: &Vm, checks: &mut Checks) {
    checks.check("the node image's policy is loaded, and the record says so", || {
        same(knows(guest, "system_u:object_r:nodeapp_exec_t:s0")?, true)?;
        contains(&guest.status()?["notes"].to_string(), "the SELinux policy in /etc/selinux differs and was loaded")
    });
    checks.check("files have the types that only the node image knows", || {
        for (path, kind) in [
            ("/usr/bin/nodeapp", "nodeapp_exec_t"),
            ("/usr/lib/nodeapp/data", "nodeapp_conf_t"),
            ("/etc/nodeapp", "nodeapp_conf_t"),
            ("/etc/nodeapp/nodeapp.conf", "nodeapp_conf_t"),
            ("/usr/bin/oc", "bin_t"),
            ("/etc/base-tool/new-default.conf", "etc_t"),
        ] {
            same(format!("{path} {}", label(guest, path)?), format!("{path} system_u:object_r:{kind}"))?;
        }
        Ok(())
    });
    checks.check("no label of what was written differs from what the new policy wants", || {
        let written = "/etc /usr/bin /usr/lib/systemd /usr/lib/nodeapp /usr/lib/base-tool";
        same(guest.ask(&format!("restorecon -nvr {written}"))?, String::new())
    });
}

fn runs(guest: &Vm, checks: &mut Checks) {
    checks.check("a service runs in the domain that only the node image knows", || {
        guest.wait_unit("nodeapp.service", "active", Duration::from_secs(60))?;
        let pid = guest.unit("nodeapp.service", "MainPID")?;
        contains(&guest.ask(&format!("cat /proc/{pid}/attr/current"))?, ":nodeapp_t:")?;
        contains(&guest.ask("journalctl -b -o cat -u nodeapp.service")?, "nodeapp's data\nnodeapp=yes")
    });
    checks.check("the agent runs in install_t", || {
        let pid = guest.unit("node-image-pivotd.service", "MainPID")?;
        contains(&guest.ask(&format!("cat /proc/{pid}/attr/current"))?, ":install_t:")
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.check("a fresh ssh login works", || same(guest.login("base-tool")?.text.trim(), "base-tool 2.0"));
}

fn undone(guest: &Vm, checks: &mut Checks) {
    checks.check("undo: the old policy is loaded again", || {
        guest.ask("node-image-pivot undo")?;
        same(knows(guest, "system_u:object_r:nodeapp_exec_t:s0")?, false)?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(guest.ask("restorecon -nvr /etc")?, String::new())?;
        same(guest.login("base-tool")?.text.trim(), "base-tool 1.0")
    });
}

fn enforced(guest: &Vm, checks: &mut Checks) {
    checks.check("SELinux was enforcing all the time", || {
        same(guest.ask("getenforce")?, "Enforcing".into())?;
        // 1404 is what the kernel logs whenever that changes.
        same(guest.ask("journalctl -b -o cat | grep -ac 'type=1404\\|MAC_STATUS' || true")?, "0".into())
    });
    checks.check("nothing that the agent does in its own domain was denied", || {
        let all = denials(guest)?;
        let of_agent: Vec<_> = all.lines().filter(|line| line.contains(":install_t:")).collect();
        if !of_agent.is_empty() {
            bail!("{}", of_agent.join("\n"));
        }
        Ok(())
    });
    checks.note(&format!("denied to others: {}", denials(guest).map_or(0, |all| all.lines().count())));
}
