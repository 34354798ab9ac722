//! Scenarios that machines and containers share about a system in use, which an installer makes its node image.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::check::{contains, etc, nothing_failed, same, same_text};
use crate::guest::Guest;
use crate::scenario::{
    Before, Expected, Pivoted, in_both_flows, modules_of_the_running_kernel_are_unchanged, no_unit_has_failed,
    systemd_reports_running, unit_is,
};
use crate::scenarios;
use crate::suite::Suite;
use crate::table::Flow;

/// The scenario in which an installer switches the system.
pub const SWITCHED: &str = "both_units_become_active_when_an_installer_starts_them";

/// The units that an installer starts.
const UNITS: &str = "node-image-pull.service node-image-overlay.service";

/// Lists all mounts but those of credentials and logins, which come and go, and the node store in RAM, which an undo keeps.
const MOUNTS: &str = "findmnt -rno TARGET,SOURCE | grep -Ev '^/run/(credentials/|user/|node-image-pivot/store )'";
/// Prefixes of the agent's units, and of those of the node store and of logins.
const COME_AND_GO: [&str; 4] = ["node-image-", r"run-node\x2dimage\x2dpivot-store", "run-user-", "user"];
/// Units that the pull wants, and a service of the boot that ends some time later.
const OTHERS: [&str; 3] = ["network-online.target", "systemd-networkd-wait-online.service", "systemd-fsckd.service"];
/// Files in /etc whose new accounts an undo leaves.
const ACCOUNTS: [&str; 4] = ["./passwd", "./group", "./shadow", "./gshadow"];
/// Part of the warning about units that systemd has forgotten.
const FORGOTTEN: &str = "that were active before are not any more";

/// Units of a system in use, with their states and processes.
#[derive(Debug, Default)]
pub struct Running(BTreeSet<String>);

impl Running {
    /// Reads them now.
    pub fn of(guest: &dyn Guest) -> Result<Self> {
        let show = "systemctl show -p Id -p MainPID -p InvocationID -p ActiveState '*.service' '*.target' '*.mount' | \
                    awk -v RS= '{$1=$1; print}'";
        Ok(Running(guest.ask(show)?.lines().map(str::to_owned).collect()))
    }

    /// Returns the names of the active units. A newer systemd removes the credentials of services that have ended.
    pub fn active(&self) -> BTreeSet<&str> {
        let active = self.0.iter().filter(|line| line.contains("ActiveState=active"));
        let ids = active.filter_map(|line| line.split(' ').find_map(|word| word.strip_prefix("Id=")));
        ids.filter(|unit| !unit.starts_with("run-credentials-")).collect()
    }

    /// Returns the state and the process of a unit.
    pub fn unit(&self, name: &str) -> Option<&str> {
        let id = format!("Id={name}");
        self.0.iter().find(|line| line.split(' ').any(|word| word == id)).map(String::as_str)
    }
}

/// Runs every scenario about a live system that is up, and that an installer makes its node image without an isolate.
/// `earlier` is the scenario in which it booted, `before` what was seen then.
pub fn switched_in_use(
    suite: &mut Suite,
    earlier: &str,
    guest: &dyn Guest,
    before: Option<&Before>,
    expected: &Expected<'_>,
) -> bool {
    suite.covers(guest, Flow::Assisted, "switched_in_use");
    let mut bed = Pivoted { guest, before, expected };
    let start = scenarios![both_units_become_active_when_an_installer_starts_them];
    let began = suite.run_after(earlier, &mut bed, &start);
    began
        & suite.run_after(SWITCHED, &mut bed, &in_both_flows())
        & suite.run_after(
            SWITCHED,
            &mut bed,
            &scenarios![
                running_services_go_on_in_multi_user,
                units_that_are_started_again_or_restarted_change_nothing,
                modules_of_the_running_kernel_are_unchanged,
                no_unit_has_failed,
                systemd_reports_running,
            ],
        )
}

/// An installer that was restarted starts them again.
fn both_units_become_active_when_an_installer_starts_them(bed: &mut Pivoted<'_>) -> Result<()> {
    let start = format!("systemctl start --no-block {UNITS}");
    bed.guest.ask(&format!("{start} && {start}"))?;
    bed.guest.wait_unit("node-image-overlay.service", "active", Duration::from_secs(600))?;
    unit_is(bed.guest, "node-image-pull.service", "active")
}

fn running_services_go_on_in_multi_user(bed: &mut Pivoted<'_>) -> Result<()> {
    let before = &bed.before.context("the base system was not seen before")?.legacy;
    let process = bed.guest.unit("base-legacy.service", "MainPID")?;
    same((&process, process == "0"), (before, false))?;
    unit_is(bed.guest, "multi-user.target", "active")?;
    unit_is(bed.guest, "node-image-finish.service", "inactive")?;
    same(bed.guest.status()?["notes"].to_string().contains(FORGOTTEN), false)
}

fn units_that_are_started_again_or_restarted_change_nothing(bed: &mut Pivoted<'_>) -> Result<()> {
    let state = "grep -c . /proc/self/mountinfo; systemctl show -p MainPID -p InvocationID ssh.service base-legacy.service; \
                 node-image-pivot status --json | jq '.state, .cost, .timeline'";
    let before = bed.guest.ask(state)?;
    for verb in ["start", "restart"] {
        bed.guest.ask(&format!("systemctl {verb} {UNITS}"))?;
        same(bed.guest.ask(state)?, before.clone())?;
    }
    Ok(())
}

/// State of a system in use from before a switch, which an undo restores.
pub struct InUse {
    running: Running,
    mounts: String,
    etc: String,
    systemd: String,
}

impl InUse {
    /// Reads it now.
    pub fn of(guest: &dyn Guest) -> Result<Self> {
        let systemd = guest.ask("systemctl show --property=Version --value")?;
        Ok(InUse { running: Running::of(guest)?, mounts: guest.ask(MOUNTS)?, etc: etc(guest)?, systemd })
    }
}

/// Runs every scenario about the undo of the switch of [`switched_in_use`]. `before` was seen before the switch.
pub fn undone_in_use(suite: &mut Suite, guest: &dyn Guest, before: Option<&InUse>) -> bool {
    suite.covers(guest, Flow::Assisted, "undone_in_use");
    let list = scenarios![
        undo_shows_the_booted_usr_while_the_system_is_in_use,
        each_unit_runs_as_before_the_switch after undo_shows_the_booted_usr_while_the_system_is_in_use,
        mounts_are_as_before_the_switch after undo_shows_the_booted_usr_while_the_system_is_in_use,
        etc_is_as_before_the_switch after undo_shows_the_booted_usr_while_the_system_is_in_use,
        a_login_and_pid_1_run_the_booted_systems_code after undo_shows_the_booted_usr_while_the_system_is_in_use,
    ];
    suite.run_after(SWITCHED, &mut (guest, before), &list)
}

type Undone<'a> = (&'a dyn Guest, Option<&'a InUse>);

fn undo_shows_the_booted_usr_while_the_system_is_in_use((guest, _): &mut Undone<'_>) -> Result<()> {
    let done = guest.ask("node-image-pivot undo")?;
    println!("       {done}");
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    same(guest.run("test -e /usr/bin/oc")?.status, 1)?;
    same(done.contains(FORGOTTEN), false)
}

fn each_unit_runs_as_before_the_switch((guest, before): &mut Undone<'_>) -> Result<()> {
    let (before, after) = (&before.context("the system was not seen before")?.running, Running::of(*guest)?);
    let concerned = |unit: &&str| !COME_AND_GO.iter().any(|prefix| unit.starts_with(prefix)) && !OTHERS.contains(unit);
    let [was, is] = [before, &after].map(|all| all.active().into_iter().filter(concerned).collect::<BTreeSet<_>>());
    same(is, was)?;
    for unit in ["multi-user.target", "base-legacy.service", "dbus.service"] {
        same(after.unit(unit), before.unit(unit))?;
    }
    nothing_failed(*guest)
}

fn mounts_are_as_before_the_switch((guest, before): &mut Undone<'_>) -> Result<()> {
    same_text(&guest.ask(MOUNTS)?, &before.context("the system was not seen before")?.mounts)
}

fn etc_is_as_before_the_switch((guest, before): &mut Undone<'_>) -> Result<()> {
    let is_account = |line: &&str| line.split(' ').any(|word| ACCOUNTS.contains(&word.trim_end_matches('-')));
    let rest = |text: &str| text.lines().filter(|line| !is_account(line)).collect::<Vec<_>>().join("\n");
    same_text(&rest(&etc(*guest)?), &rest(&before.context("the system was not seen before")?.etc))
}

fn a_login_and_pid_1_run_the_booted_systems_code((guest, before): &mut Undone<'_>) -> Result<()> {
    let before = before.context("the system was not seen before")?;
    same(&guest.ask("systemctl show --property=Version --value")?, &before.systemd)?;
    contains(&guest.login("/usr/sbin/sshd -V 2>&1; base-tool")?.text, "base-tool 1.0")
}
