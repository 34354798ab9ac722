//! The bootstrap flow: the units run in the pivot target.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Serving};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::scenario::{unit_is, wait_pivoted};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::table::Flow;

use super::{PIVOT, SERVICES, SOON, ask_socket, boot, class_of, link, listens, pid, put_units};

/// A container in the bootstrap flow, the main processes of its services before the switch, and the plan.
struct Bootstrap {
    bed: Bed,
    before: Vec<(&'static str, String)>,
    plan: Value,
}

impl Bootstrap {
    fn before(&self, name: &str) -> Result<String> {
        let found = self.before.iter().find(|(one, _)| *one == name);
        found.map(|(_, pid)| pid.clone()).with_context(|| format!("{name} did not run before"))
    }

    fn now(&self, name: &str) -> Result<String> {
        pid(&self.bed.guest, &format!("{name}.service"))
    }

    fn is_the_same_process(&self, name: &str) -> Result<()> {
        same(self.now(name)?, self.before(name)?)
    }

    fn has_class(&self, unit: &str, class: &str) -> Result<()> {
        same(class_of(&self.plan, unit)?, class)
    }

    fn is_not_in_the_plan(&self, unit: &str) -> Result<()> {
        if class_of(&self.plan, unit).is_ok() {
            bail!("it is in the plan")
        }
        Ok(())
    }
}

fn files(files: &Files) -> Result<()> {
    // A default target of the administrator, which the agent isolates in the end.
    files.put(
        "/etc/systemd/system/custom.target",
        0o644,
        "[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\nAllowIsolate=yes\n",
    )?;
    std::os::unix::fs::symlink("custom.target", files.root().join("etc/systemd/system/default.target"))?;
    for name in SERVICES {
        link(files, "custom.target", &format!("{name}.{}", if listens(name) { "socket" } else { "service" }))?;
    }
    put_units(files, "node-image-pivot.target")
}

#[test]
fn each_class_of_unit_is_treated_as_planned_in_the_bootstrap_flow() -> Result<()> {
    let mut suite = Suite::new("units: the bootstrap flow");
    let bed = boot("units-bootstrap", "node-b", Serving::Later, files)?;
    for name in SERVICES.into_iter().filter(|name| !listens(name)) {
        bed.guest.wait_unit(&format!("{name}.service"), "active", SOON)?;
    }
    bed.guest.wait_unit("base-legacy.service", "active", SOON)?;
    let mut bootstrap = Bootstrap { bed, before: Vec::new(), plan: Value::Null };
    suite.run(
        &mut bootstrap,
        &scenarios![
            both_sockets_answer_before_the_switch,
            the_machine_becomes_its_node_image after both_sockets_answer_before_the_switch,
        ],
    );
    suite.run_after("the_machine_becomes_its_node_image", &mut bootstrap, &classes());
    suite.covers(&bootstrap.bed.guest, Flow::Bootstrap, "each_class_of_unit_is_treated_as_planned");
    suite.finish()
}

/// Returns a scenario for each class, and those about the machine as a whole.
fn classes() -> [Scenario<Bootstrap>; 17] {
    scenarios![
        restart_follows_from_a_drop_in_that_changes_exec_start,
        restart_follows_from_the_key_of_the_unit,
        description_order_and_timeouts_change_without_a_restart,
        a_service_in_another_root_directory_is_unaffected,
        reload_follows_from_the_key_and_keeps_the_process,
        never_follows_from_the_key_and_from_the_configuration,
        a_requirement_of_a_kept_service_is_kept,
        a_service_that_refuses_a_manual_stop_is_kept,
        a_new_socket_of_a_running_service_starts_and_the_service_restarts_behind_it,
        a_unit_that_the_node_image_lacks_stops,
        a_unit_that_the_node_image_adds_starts,
        units_that_would_end_the_boot_are_held_back_until_an_administrator_permits_them,
        a_socket_keeps_listening_and_its_next_connection_gets_the_new_service,
        a_socket_with_another_address_restarts,
        the_default_target_of_the_machine_is_reached,
        status_and_report_list_units_that_still_run_old_code,
        no_unit_has_failed,
    ]
}

fn both_sockets_answer_before_the_switch(bootstrap: &mut Bootstrap) -> Result<()> {
    let guest = &bootstrap.bed.guest;
    same(ask_socket(guest, "/run/t-socket")?, "old".into())?;
    same(ask_socket(guest, "/run/t-listen")?, "old".into())?;
    let running = SERVICES.into_iter().filter(|name| !listens(name));
    bootstrap.before =
        running.map(|name| Ok((name, pid(guest, &format!("{name}.service"))?))).collect::<Result<_>>()?;
    Ok(())
}

fn the_machine_becomes_its_node_image(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.bed.registry.resume()?;
    let guest = &bootstrap.bed.guest;
    wait_pivoted(guest, PIVOT)?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    let plan: Value = serde_json::from_str(&guest.ask("cat /run/node-image-pivot/plan.json")?)?;
    bootstrap.plan = serde_json::json!({ "plan": plan });
    Ok(())
}

fn restart_follows_from_a_drop_in_that_changes_exec_start(bootstrap: &mut Bootstrap) -> Result<()> {
    let line = "tr '\\0' ' ' </proc/$(systemctl show -p MainPID --value t-exec.service)/cmdline";
    contains(&bootstrap.bed.guest.ask(line)?, "9001")?;
    bootstrap.has_class("t-exec.service", "restart")
}

fn restart_follows_from_the_key_of_the_unit(bootstrap: &mut Bootstrap) -> Result<()> {
    if bootstrap.now("t-key-restart")? == bootstrap.before("t-key-restart")? {
        bail!("the same process")
    }
    bootstrap.has_class("t-key-restart.service", "restart")
}

fn description_order_and_timeouts_change_without_a_restart(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-harmless")?;
    same(bootstrap.bed.guest.unit("t-harmless.service", "TimeoutStopUSec")?, "7s".into())?;
    bootstrap.is_not_in_the_plan("t-harmless.service")
}

fn a_service_in_another_root_directory_is_unaffected(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-root")?;
    bootstrap.is_not_in_the_plan("t-root.service")
}

fn reload_follows_from_the_key_and_keeps_the_process(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-reload")?;
    bootstrap.bed.guest.ask("test -e /run/t-reloaded")?;
    bootstrap.has_class("t-reload.service", "reload")
}

fn never_follows_from_the_key_and_from_the_configuration(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-never")?;
    bootstrap.is_the_same_process("t-config")?;
    bootstrap.has_class("t-never.service", "never")?;
    bootstrap.has_class("t-config.service", "never")
}

fn a_requirement_of_a_kept_service_is_kept(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-needed")?;
    bootstrap.has_class("t-needed.service", "never")
}

fn a_service_that_refuses_a_manual_stop_is_kept(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.is_the_same_process("t-refuses")?;
    bootstrap.has_class("t-refuses.service", "never")
}

fn journal(guest: &dyn Guest) -> Result<String> {
    guest.ask("journalctl -u node-image-pivotd.service -o cat")
}

fn a_new_socket_of_a_running_service_starts_and_the_service_restarts_behind_it(
    bootstrap: &mut Bootstrap,
) -> Result<()> {
    bootstrap.has_class("t-arrives.socket", "start")?;
    unit_is(&bootstrap.bed.guest, "t-arrives.socket", "active")?;
    if bootstrap.now("t-arrives")? == bootstrap.before("t-arrives")? {
        bail!("the same process, without the socket")
    }
    contains(&journal(&bootstrap.bed.guest)?, "t-arrives.socket: start: ")
}

fn a_unit_that_the_node_image_lacks_stops(bootstrap: &mut Bootstrap) -> Result<()> {
    unit_is(&bootstrap.bed.guest, "base-legacy.service", "inactive")?;
    bootstrap.has_class("base-legacy.service", "stop")?;
    contains(&journal(&bootstrap.bed.guest)?, "base-legacy.service: stop: ")
}

fn a_unit_that_the_node_image_adds_starts(bootstrap: &mut Bootstrap) -> Result<()> {
    bootstrap.has_class("t-new.service", "start")?;
    bootstrap.has_class("kubelet.service", "start")?;
    bootstrap.now("t-new").map(drop)
}

fn units_that_would_end_the_boot_are_held_back_until_an_administrator_permits_them(
    bootstrap: &mut Bootstrap,
) -> Result<()> {
    let guest = &bootstrap.bed.guest;
    for unit in ["zincati.service", "t-reboots.timer"] {
        unit_is(guest, unit, "inactive")?;
        bootstrap.has_class(unit, "hold")?;
    }
    let report = guest.ask("node-image-pivot report")?;
    contains(&report, "held back until the next boot: t-reboots.timer zincati.service")?;
    guest.ask("systemctl start zincati.service")?;
    unit_is(guest, "zincati.service", "inactive")?;
    guest.ask("rm /run/node-image-pivot/held-units/zincati.service && systemctl start zincati.service")?;
    unit_is(guest, "zincati.service", "active")
}

fn a_socket_keeps_listening_and_its_next_connection_gets_the_new_service(bootstrap: &mut Bootstrap) -> Result<()> {
    unit_is(&bootstrap.bed.guest, "t-socket.service", "inactive")?;
    same(ask_socket(&bootstrap.bed.guest, "/run/t-socket")?, "new".into())?;
    bootstrap.has_class("t-socket.service", "restart")
}

fn a_socket_with_another_address_restarts(bootstrap: &mut Bootstrap) -> Result<()> {
    same(ask_socket(&bootstrap.bed.guest, "/run/t-listen.new")?, "old".into())?;
    bootstrap.has_class("t-listen.socket", "restart")
}

fn the_default_target_of_the_machine_is_reached(bootstrap: &mut Bootstrap) -> Result<()> {
    unit_is(&bootstrap.bed.guest, "custom.target", "active")?;
    unit_is(&bootstrap.bed.guest, "node-image-pivot.target", "inactive")
}

fn status_and_report_list_units_that_still_run_old_code(bootstrap: &mut Bootstrap) -> Result<()> {
    let status = bootstrap.bed.guest.status()?;
    if !status["still_old"].is_array() {
        bail!("no still_old: {status}")
    }
    contains(&bootstrap.bed.guest.ask("node-image-pivot report")?, "restarted: ")
}

fn no_unit_has_failed(bootstrap: &mut Bootstrap) -> Result<()> {
    nothing_failed(&bootstrap.bed.guest)
}
