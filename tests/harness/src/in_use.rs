//! Scenarios that machines and containers share about a system in use, which an installer makes its node image.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::check::same;
use crate::guest::Guest;
use crate::scenario::{
    Before, Expected, Pivoted, in_both_flows, modules_of_the_running_kernel_are_unchanged, no_unit_has_failed,
    systemd_reports_running, unit_is,
};
use crate::scenarios;
use crate::suite::Suite;
use crate::table::Flow;

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
        let id = |line: &'_ str| line.split(' ').find_map(|word| word.strip_prefix("Id=")).unwrap_or_default();
        let active = self.0.iter().filter(|line| line.contains("ActiveState=active"));
        active.map(|line| id(line)).filter(|unit| !unit.starts_with("run-credentials-")).collect()
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
    let earlier = "both_units_become_active_when_an_installer_starts_them";
    began
        & suite.run_after(earlier, &mut bed, &in_both_flows())
        & suite.run_after(
            earlier,
            &mut bed,
            &scenarios![
                running_services_go_on_in_multi_user,
                modules_of_the_running_kernel_are_unchanged,
                no_unit_has_failed,
                systemd_reports_running,
            ],
        )
}

fn both_units_become_active_when_an_installer_starts_them(bed: &mut Pivoted<'_>) -> Result<()> {
    bed.guest.ask("systemctl start --no-block node-image-pull.service node-image-overlay.service")?;
    bed.guest.wait_unit("node-image-overlay.service", "active", Duration::from_secs(600))?;
    unit_is(bed.guest, "node-image-pull.service", "active")
}

fn running_services_go_on_in_multi_user(bed: &mut Pivoted<'_>) -> Result<()> {
    let before = &bed.before.context("the base system was not seen before")?.legacy;
    let process = bed.guest.unit("base-legacy.service", "MainPID")?;
    same((&process, process == "0"), (before, false))?;
    unit_is(bed.guest, "multi-user.target", "active")?;
    unit_is(bed.guest, "node-image-finish.service", "inactive")
}
