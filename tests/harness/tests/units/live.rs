//! A live system: the switch stops no service, the plan gives the reasons, and an administrator finishes by hand.

use std::process::Child;

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Serving};
use testbed::guest::{Answer, Guest};
use testbed::other_agent::{self, wait_for_agent};
use testbed::proc::wait_for;
use testbed::scenario::{configured_later, unit_is};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::table::Flow;

use super::{LAYER, SOON, ask_socket, boot_with, class_of, pid, put_units};

/// Services whose main processes the switch keeps.
const KEPT: &str =
    "t-exec t-harmless t-root t-reload t-never t-key-restart t-config t-socket base-legacy systemd-networkd";
const HOST_KEYS: &str = "cd /etc/ssh && stat -c '%n %a %u %g' ssh_host_* && sha256sum ssh_host_*";
const USER_MANAGER: &str = "systemctl show -p MainPID --value user@0.service";

/// A live system, and what it looked like before the switch.
struct Live {
    bed: Bed,
    processes: String,
    host_keys: String,
    session: Option<Child>,
    user_manager: String,
}

impl Live {
    fn processes(guest: &dyn Guest) -> Result<String> {
        guest.ask(&format!("for u in {KEPT}; do echo $u $(systemctl show -p MainPID --value $u); done"))
    }

    /// Returns true if status lists a unit as one that still runs the bootimage's code.
    fn runs_old_code(&self, unit: &str) -> Result<bool> {
        let status = self.bed.guest.status()?;
        let list = status["still_old"].as_array().context("no still_old")?;
        Ok(list.iter().any(|one| one["unit"] == unit))
    }
}

#[test]
fn a_live_system_loses_no_service() -> Result<()> {
    let mut suite = Suite::new("units: a live system");
    let layer = [LAYER, &[other_agent::FILE]].concat();
    let bed = boot_with("units-live", "node-a", &layer, Serving::AtBoot, |files| {
        put_units(files, "multi-user.target")?;
        configured_later(files)
    })?;
    let guest = &bed.guest;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    same(ask_socket(guest, "/run/t-socket")?, "old".into())?;
    let (processes, host_keys) = (Live::processes(guest)?, guest.ask(HOST_KEYS)?);
    let mut live = Live { bed, processes, host_keys, session: None, user_manager: String::new() };
    suite.run(
        &mut live,
        &scenarios![
            the_plan_has_classes_and_reasons_before_the_switch,
            an_ssh_session_is_open,
            the_switch_keeps_every_process_and_nothing_fails,
            the_agent_of_the_node_image_takes_over after the_switch_keeps_every_process_and_nothing_fails,
            a_new_login_gets_the_new_sshd_with_the_same_host_keys
                after the_switch_keeps_every_process_and_nothing_fails,
            status_lists_units_that_still_run_old_code after the_switch_keeps_every_process_and_nothing_fails,
            the_user_manager_is_the_same_process_and_runs_the_new_systemd
                after the_switch_keeps_every_process_and_nothing_fails,
            finish_by_hand_restarts_what_the_isolate_rearranges
                after the_switch_keeps_every_process_and_nothing_fails,
            the_open_session_survives_the_switch_and_the_isolate after an_ssh_session_is_open,
            undo_starts_stopped_units_and_restores_restarted_ones
                after the_switch_keeps_every_process_and_nothing_fails,
            the_agent_of_the_bootimage_takes_over_after_the_undo after the_agent_of_the_node_image_takes_over,
            an_agent_that_cannot_continue_does_not_take_over
                after the_agent_of_the_bootimage_takes_over_after_the_undo,
        ],
    );
    suite.covers(&live.bed.guest, Flow::Assisted, "a_live_system_loses_no_service");
    suite.finish()
}

fn the_plan_has_classes_and_reasons_before_the_switch(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    let plan: Value = serde_json::from_str(&guest.ask("node-image-pivot plan --json")?)?;
    for (unit, class) in [
        ("t-exec.service", "never"),
        ("t-reload.service", "reload"),
        ("t-key-restart.service", "never"),
        ("base-legacy.service", "never"),
        ("t-listen.socket", "never"),
        ("t-needed.service", "never"),
        ("ssh.service", "restart"),
        ("systemd-logind.service", "restart"),
        ("dbus.service", "never"),
        ("systemd-networkd.service", "never"),
    ] {
        same((unit, class_of(&plan, unit)?), (unit, class))?;
    }
    contains(&guest.ask("node-image-pivot plan")?, "unit: never t-exec.service ([Service] ExecStart= changed")?;
    same(Live::processes(guest)?, live.processes.clone())
}

fn an_ssh_session_is_open(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    let command = "touch /run/t-session; base-tool; until test -e /run/t-switched; do sleep 0.2; done; base-tool";
    live.session = Some(guest.open_session(command)?);
    wait_for("the session", SOON, || Ok(guest.run("test -e /run/t-session")?.status == 0))?;
    live.user_manager = guest.ask(USER_MANAGER)?;
    Ok(())
}

fn the_switch_keeps_every_process_and_nothing_fails(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    guest.ask("node-image-pivot run")?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    same(Live::processes(guest)?, live.processes.clone())?;
    guest.ask("test -e /run/t-reloaded")?;
    nothing_failed(guest)
}

fn the_agent_of_the_node_image_takes_over(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    wait_for_agent(guest, other_agent::PROGRAM)?;
    same(guest.status()?["state"].as_str(), Some("switched"))?;
    contains(
        &guest.ask("journalctl -u node-image-pivotd.service -o cat")?,
        "handing over to /usr/bin/node-image-pivot",
    )?;
    nothing_failed(guest)
}

fn a_new_login_gets_the_new_sshd_with_the_same_host_keys(live: &mut Live) -> Result<()> {
    contains(&live.bed.guest.login("ssh -V 2>&1")?.text, "OpenSSH_10")?;
    same(live.bed.guest.ask(HOST_KEYS)?, live.host_keys.clone())
}

fn status_lists_units_that_still_run_old_code(live: &mut Live) -> Result<()> {
    same(live.runs_old_code("dbus.service")?, true)?;
    same(live.runs_old_code("systemd-networkd.service")?, true)?;
    same(live.runs_old_code("ssh.service")?, false)?;
    same(live.runs_old_code("t-root.service")?, false)?;
    let status = live.bed.guest.ask("node-image-pivot status")?;
    contains(&status, "still runs the bootimage's code: dbus.service (/usr/")
}

fn the_user_manager_is_the_same_process_and_runs_the_new_systemd(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    let maps = || guest.ask(&format!("cat /proc/$({USER_MANAGER})/maps"));
    wait_for("the new systemd", SOON, || Ok(maps()?.contains("libsystemd-shared-257")))?;
    same(guest.ask(USER_MANAGER)?, live.user_manager.clone())?;
    guest.login("systemctl --user start default.target").map(drop)
}

fn finish_by_hand_restarts_what_the_isolate_rearranges(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    guest.ask("node-image-pivot finish")?;
    wait_for("the end of all jobs", SOON, || Ok(guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0"))?;
    same(live.runs_old_code("dbus.service")?, true)?;
    same(live.runs_old_code("systemd-networkd.service")?, false)?;
    pid(guest, "systemd-networkd.service")?;
    unit_is(guest, "t-new.service", "active")?;
    unit_is(guest, "t-arrives.socket", "active")?;
    unit_is(guest, "base-legacy.service", "inactive")?;
    nothing_failed(guest)
}

fn the_open_session_survives_the_switch_and_the_isolate(live: &mut Live) -> Result<()> {
    live.bed.guest.ask("touch /run/t-switched")?;
    let session = live.session.take().context("the session was not opened")?;
    let answer = Answer::of(&session.wait_with_output()?);
    same((answer.status, answer.text.trim().to_owned()), (0, "base-tool 1.0\nbase-tool 2.0".to_owned()))
}

fn undo_starts_stopped_units_and_restores_restarted_ones(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    guest.ask("node-image-pivot undo")?;
    unit_is(guest, "base-legacy.service", "active")?;
    unit_is(guest, "t-new.service", "inactive")?;
    let line = "tr '\\0' ' ' </proc/$(systemctl show -p MainPID --value t-exec.service)/cmdline";
    contains(&guest.ask(line)?, "9000")?;
    nothing_failed(guest)
}

fn the_agent_of_the_bootimage_takes_over_after_the_undo(live: &mut Live) -> Result<()> {
    wait_for_agent(&live.bed.guest, "/usr/bin/node-image-pivot")?;
    nothing_failed(&live.bed.guest)
}

/// The node image's agent does not know the check, so the bootimage's continues and undoes.
fn an_agent_that_cannot_continue_does_not_take_over(live: &mut Live) -> Result<()> {
    let guest = &live.bed.guest;
    let agent = pid(guest, "node-image-pivotd.service")?;
    guest.ask("touch /run/older && node-image-pivot run")?;
    let notes = || Ok::<_, anyhow::Error>(guest.status()?["notes"].to_string());
    wait_for("the refusal", SOON, || Ok(notes()?.contains("cannot take over, and this one continues")))?;
    guest.ask("node-image-pivot undo")?;
    same(pid(guest, "node-image-pivotd.service")?, agent)?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}
