//! Hooks, proxies, units of others, /var and /opt, in the bootstrap flow.

use anyhow::{Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Image, Images, work_dir};
use testbed::proc::wait_for;
use testbed::proxy::Proxy;
use testbed::registry::{Registry, registries_conf};
use testbed::scenario::{node_files, unit_is, wait_pivoted};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::table::Flow;
use testbed::vm::{self, Medium, Vm};

use super::{PIVOT, SOON, UNITS, boot, installer, journal, record};

/// Puts the files of a bootstrap node: all that others attach to the units of the pivot, and hooks.
fn bootstrap_files(files: &Files, image: &str, proxy: &Proxy) -> Result<()> {
    node_files(files, image, "127.0.0.1", 1)?;
    // A name that only the proxy can resolve.
    let mirror = registries_conf("mirror.example.test", 5000);
    files.put("/etc/containers/registries.conf.d/50-testbed.conf", 0o644, &mirror)?;
    let http = format!("http://{}:{}", vm::HOST, proxy.port);
    let environment = format!("[Manager]\nDefaultEnvironment=HTTP_PROXY={http} HTTPS_PROXY={http} NO_PROXY=.svc\n");
    files.put("/etc/systemd/system.conf.d/10-default-env.conf", 0o644, &environment)?;
    files.put("/var/usrlocal/bin/bootstrap-service-record.sh", 0o755, "")?;
    attached_units(files)?;
    installer::put(files, "")?;
    hooks(files)?;
    files.put("/etc/tmpfiles.d/old-links.conf", 0o644, "L /var/opt/gone - - - - ../../usr/lib/opt/gone\n")?;
    files.put("/var/lib/kept-app/data", 0o600, "the machine's own\n")
}

/// Puts two units that the pull must wait for. Each ends once it has seen the job of the pull waiting, and fails if the
/// pull began earlier.
fn attached_units(files: &Files) -> Result<()> {
    let slow = |name: &str, unit: &str| {
        let waiting = "systemctl list-jobs --no-legend node-image-pull.service | grep -q waiting";
        let text = format!(
            "[Unit]\nDefaultDependencies=no\n{unit}\n[Service]\nType=oneshot\nRemainAfterExit=yes\nTimeoutStartSec=300\n\
             ExecStart=/bin/sh -c 'until {waiting}; do sleep 0.2; done; test ! -e /run/pull-began && touch /run/{name}'\n"
        );
        files.put(&format!("/etc/systemd/system/{name}.service"), 0o644, &text)
    };
    slow("my-dns", "")?;
    slow("attached", "Before=node-image-pull.service")?;
    files.put(
        "/etc/systemd/system/node-image-pull.service.d/dns.conf",
        0o644,
        "[Unit]\nWants=my-dns.service\nAfter=my-dns.service\n[Service]\nExecStartPre=/bin/touch /run/pull-began\n",
    )?;
    let wants = "[Unit]\nWants=attached.service\n";
    files.put("/etc/systemd/system/node-image-pivot.target.d/attached.conf", 0o644, wants)
}

fn hooks(files: &Files) -> Result<()> {
    files.put("/etc/node-image-pivot.conf.d/60-hooks.toml", 0o644, "[hooks]\ntimeout = 12\n")?;
    let hook = |path: &str, text: &str| {
        files.put(&format!("/etc/node-image-pivot/{path}"), 0o755, &format!("#!/bin/sh\n{text}\n"))
    };
    hook("pre-switch.d/10-gate", "env >/run/pre-environment; test -e /run/open || { echo the gate is shut; exit 7; }")?;
    hook("pre-switch.d/20-slow", "test ! -e /run/slow || { echo takes too long; sleep infinity; }")?;
    hook("post-switch.d/10-count", "base-tool; env >/run/post-environment; echo >>/run/count-10")?;
    hook("post-switch.d/20-fails", "echo cannot do it >&2; exit 4")?;
    // systemd ends the hook together with the agent that it has killed.
    let kill = "echo >>/run/count-30; test $(wc -l </run/count-30) -gt 1 || \
                { kill -9 $(systemctl show -p MainPID --value node-image-pivotd.service); sleep infinity; }";
    hook("post-switch.d/30-kills-the-agent-once", kill)
}

/// A bootstrap node whose registry is behind a proxy.
struct Attached<'a> {
    guest: Vm,
    image: &'a Image,
    proxy: Proxy,
    _registry: Registry,
}

impl Attached<'_> {
    /// Checks that a hook has refused the switch, with `word` in the reason, and that the system is unchanged.
    fn is_refused(&self, word: &str) -> Result<()> {
        let guest = &self.guest;
        wait_for("the refusal", PIVOT, || {
            let error = guest.status()?["error"].clone();
            Ok(error["class"] == "refused" && error["message"].as_str().is_some_and(|text| text.contains(word)))
        })?;
        guest.wait_unit(UNITS[1], "failed", SOON)?;
        contains(&guest.unit(UNITS[1], "StatusText")?, word)?;
        contains(&guest.unit(UNITS[1], "StatusText")?, "the running system is unchanged")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        guest.ask("test ! -e /run/node-image-pivot/pivoted && test ! -e /opt/cni").map(drop)
    }
}

#[test]
fn hooks_proxies_and_units_of_others_keep_working() -> Result<()> {
    let images = Images::ensure()?;
    let image = images.image("node-small")?;
    let mut suite = Suite::new("drop-in: hooks, proxies, units of others, /var and /opt, in the bootstrap flow");
    let registry = Registry::start(&images.storage, &work_dir("dropin-boot-registry")?, None, None)?;
    let proxy = Proxy::start(registry.port)?;
    let guest =
        boot("dropin-boot", &images.boot, Medium::Iso, |files| bootstrap_files(files, &image.by_digest(), &proxy))?;
    let mut attached = Attached { guest, image, proxy, _registry: registry };
    suite.run(
        &mut attached,
        &scenarios![
            a_hook_that_fails_refuses_the_switch_with_its_output,
            the_boot_and_the_units_of_an_installer_are_taken_over,
            the_pull_waits_for_units_that_drop_ins_attach after a_hook_that_fails_refuses_the_switch_with_its_output,
            the_pull_uses_the_proxy_of_the_manager after a_hook_that_fails_refuses_the_switch_with_its_output,
            a_hook_gets_flow_target_plan_and_digest after a_hook_that_fails_refuses_the_switch_with_its_output,
            a_hook_that_takes_too_long_is_stopped_and_refuses_the_switch
                after a_hook_that_fails_refuses_the_switch_with_its_output,
            the_switch_is_made_when_the_hooks_agree after a_hook_that_fails_refuses_the_switch_with_its_output,
        ],
    );
    suite.run_after("the_switch_is_made_when_the_hooks_agree", &mut attached, &after_the_switch());
    suite.covers(&attached.guest, Flow::Bootstrap, "hooks_proxies_and_units_of_others_keep_working");
    suite.finish()
}

/// Returns the scenarios about the node after its switch.
fn after_the_switch<'a>() -> [Scenario<Attached<'a>>; 11] {
    scenarios![
        a_hook_after_the_switch_runs_once_even_if_the_agent_is_killed_in_it,
        a_hook_that_fails_after_the_switch_is_a_warning,
        hooks_of_the_node_image_run_after_the_switch_only,
        files_of_the_node_image_for_opt_and_var_appear,
        existing_files_are_kept_and_dangling_links_of_the_bootimage_are_removed,
        sysctl_and_modules_load_run_again_for_files_of_the_merge,
        new_units_are_enabled_by_links_of_the_image_and_not_by_presets,
        tools_whose_inputs_are_unchanged_do_not_run,
        the_service_records_have_two_refusals_and_a_success,
        the_units_stay_those_of_the_agent,
        no_unit_has_failed,
    ]
}

fn a_hook_that_fails_refuses_the_switch_with_its_output(attached: &mut Attached<'_>) -> Result<()> {
    attached.is_refused("exit status: 7): the gate is shut")
}

/// The installer's generator links to another target.
fn the_boot_and_the_units_of_an_installer_are_taken_over(attached: &mut Attached<'_>) -> Result<()> {
    let link = "readlink /run/systemd/generator/default.target";
    same(attached.guest.ask(link)?, "/etc/systemd/system/node-image-overlay.target".into())?;
    unit_is(&attached.guest, "node-image-pivot.target", "active")?;
    installer::is_taken_over(&attached.guest)
}

/// A drop-in of the pull names one unit; the other unit names the pull.
fn the_pull_waits_for_units_that_drop_ins_attach(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    guest.ask("test -e /run/my-dns && test -e /run/attached && test -e /run/pull-began")?;
    same(guest.unit("my-dns.service", "Result")?, "success".into())?;
    same(guest.unit("attached.service", "Result")?, "success".into())
}

/// Only the proxy can resolve the name of the mirror.
fn the_pull_uses_the_proxy_of_the_manager(attached: &mut Attached<'_>) -> Result<()> {
    let requests = attached.proxy.requests();
    if !requests.iter().any(|line| line.starts_with("GET http://mirror.example.test:5000/v2/")) {
        bail!("asked of the proxy: {requests:?}");
    }
    attached.guest.ask("! getent hosts mirror.example.test").map(drop)
}

fn a_hook_gets_flow_target_plan_and_digest(attached: &mut Attached<'_>) -> Result<()> {
    let environment = attached.guest.ask("cat /run/pre-environment")?;
    for line in [
        "NODE_IMAGE_PIVOT_HOOK=pre-switch",
        "NODE_IMAGE_PIVOT_FLOW=bootstrap",
        "NODE_IMAGE_PIVOT_TARGET=multi-user.target",
        "NODE_IMAGE_PIVOT_PLAN=/run/node-image-pivot/plan.json",
        &format!("NODE_IMAGE_PIVOT_DIGEST={}", attached.image.digest),
    ] {
        contains(&environment, line)?;
    }
    attached.guest.ask("! grep -q NOTIFY_SOCKET /run/pre-environment").map(drop)
}

fn a_hook_that_takes_too_long_is_stopped_and_refuses_the_switch(attached: &mut Attached<'_>) -> Result<()> {
    attached.guest.ask("touch /run/open /run/slow")?;
    attached.guest.run("systemctl start node-image-finish.service")?;
    attached.is_refused("stopped after 12 s (hooks.timeout): takes too long")?;
    attached.guest.ask("! pgrep -x sleep").map(drop)
}

fn the_switch_is_made_when_the_hooks_agree(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    guest.ask("rm /run/slow && systemctl start --no-block node-image-finish.service")?;
    wait_for("another attempt", SOON, || Ok(guest.status()?["state"] != "failed"))?;
    wait_pivoted(guest, PIVOT)
}

/// A hook that did not end runs again; the others do not.
fn a_hook_after_the_switch_runs_once_even_if_the_agent_is_killed_in_it(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    same(guest.ask("wc -l </run/count-10")?, "1".into())?;
    same(guest.ask("wc -l </run/count-30")?, "2".into())?;
    contains(&guest.ask("cat /run/post-environment")?, "NODE_IMAGE_PIVOT_HOOK=post-switch")?;
    contains(&journal(guest)?, "post-switch hook 10-count: base-tool 1.0")
}

fn a_hook_that_fails_after_the_switch_is_a_warning(attached: &mut Attached<'_>) -> Result<()> {
    let notes = attached.guest.status()?["notes"].to_string();
    contains(
        &notes,
        "warning: the hook /etc/node-image-pivot/post-switch.d/20-fails failed (exit status: 4): cannot do it",
    )
}

fn hooks_of_the_node_image_run_after_the_switch_only(attached: &mut Attached<'_>) -> Result<()> {
    let journal = journal(&attached.guest)?;
    contains(&journal, "post-switch hook 50-image: hook of the node image")?;
    same(journal.contains("runs too late"), false)
}

fn files_of_the_node_image_for_opt_and_var_appear(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    same(guest.ask("/opt/cni/bin/bridge")?, "bridge of the node image".into())?;
    same(
        guest.ask("stat -c '%a %U' /var/lib/small-app/data; cat /var/lib/small-app/data")?,
        "640 root\nfrom the factory".into(),
    )
}

fn existing_files_are_kept_and_dangling_links_of_the_bootimage_are_removed(attached: &mut Attached<'_>) -> Result<()> {
    same(attached.guest.ask("cat /var/lib/kept-app/data")?, "the machine's own".into())?;
    attached.guest.ask("test ! -L /opt/gone").map(drop)
}

fn sysctl_and_modules_load_run_again_for_files_of_the_merge(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    same(guest.ask("cat /proc/sys/net/ipv4/ip_default_ttl")?, "63".into())?;
    contains(&journal(guest)?, "systemd-sysctl.service runs again: etc/sysctl.d differs")?;
    contains(&journal(guest)?, "systemd-modules-load.service runs again: etc/modules-load.d differs")
}

fn new_units_are_enabled_by_links_of_the_image_and_not_by_presets(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    unit_is(guest, "small-enabled.service", "active")?;
    same(guest.run("systemctl is-enabled small-disabled.service")?.text.trim().to_owned(), "disabled".to_owned())?;
    unit_is(guest, "small-disabled.service", "inactive")
}

fn tools_whose_inputs_are_unchanged_do_not_run(attached: &mut Attached<'_>) -> Result<()> {
    let journal = journal(&attached.guest)?;
    for tool in ["ldconfig", "systemd-sysusers", "systemd-hwdb update", "udevadm control --reload"] {
        contains(&journal, &format!("{tool} is not run: its inputs are unchanged"))?;
        same(journal.contains(&format!("{tool} was run")), false)?;
    }
    contains(&journal, "systemd-binfmt.service does not run again: its inputs are unchanged")
}

fn the_service_records_have_two_refusals_and_a_success(attached: &mut Attached<'_>) -> Result<()> {
    let guest = &attached.guest;
    let overlay = record(guest, "node-image-overlay")?;
    let ends: Vec<_> = overlay.iter().filter(|entry| entry.starts_with("- service end")).map(String::as_str).collect();
    same(ends, vec!["- service end failure", "- service end failure", "- service end success"])?;
    contains(&guest.ask("cat /var/log/openshift/node-image-overlay.json")?, "the gate is shut")?;
    contains(&record(guest, "node-image-finish")?.join("\n"), "finish stage end success")
}

fn the_units_stay_those_of_the_agent(attached: &mut Attached<'_>) -> Result<()> {
    installer::is_taken_over(&attached.guest)
}

fn no_unit_has_failed(attached: &mut Attached<'_>) -> Result<()> {
    nothing_failed(&attached.guest)
}
