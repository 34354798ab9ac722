//! Scenarios that machines and containers share about a guest without a pivot: one that waits, or is left alone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::check::{contains, contains_any, nothing_failed, same};
use crate::guest::Guest;
use crate::images::Image;
use crate::proc::wait_for;
use crate::scenario::unit_is;
use crate::scenarios;
use crate::suite::Suite;
use crate::table::Flow;

type AnyGuest<'a> = &'a dyn Guest;

/// Runs the scenarios about a system that the agent leaves alone: base system, normal target, no unit of the pivot.
pub fn left_alone(suite: &mut Suite, mut guest: &dyn Guest) -> bool {
    suite.covers(guest, Flow::LeftAlone, "left_alone");
    let list = scenarios![
        a_system_that_is_left_alone_reaches_multi_user,
        a_system_that_is_left_alone_runs_no_unit_of_the_pivot,
        a_system_that_is_left_alone_keeps_its_usr,
        a_system_that_is_left_alone_has_no_failed_unit,
    ];
    suite.run(&mut guest, &list)
}

fn a_system_that_is_left_alone_reaches_multi_user(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.wait_unit("multi-user.target", "active", Duration::from_secs(180))
}

fn a_system_that_is_left_alone_runs_no_unit_of_the_pivot(guest: &mut AnyGuest<'_>) -> Result<()> {
    let units = ["node-image-pull.service", "node-image-overlay.service", "node-image-pivot.target"];
    units.iter().try_for_each(|unit| unit_is(*guest, unit, "inactive"))
}

fn a_system_that_is_left_alone_keeps_its_usr(guest: &mut AnyGuest<'_>) -> Result<()> {
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn a_system_that_is_left_alone_has_no_failed_unit(guest: &mut AnyGuest<'_>) -> Result<()> {
    nothing_failed(*guest)
}

struct Live<'a> {
    guest: &'a dyn Guest,
    /// Directory of its bootimage.
    boot: &'a Path,
    image: &'a Image,
}

/// Runs the scenarios about a live system of the bootimage in `boot`, without a pivot. A registry that it reaches has `image`.
pub fn boots_as_a_live_system(suite: &mut Suite, guest: &dyn Guest, boot: &Path, image: &Image) -> bool {
    suite.covers(guest, Flow::LeftAlone, "boots_as_a_live_system");
    suite.run(
        &mut Live { guest, boot, image },
        &scenarios![
            systemd_reports_running,
            libostree_lists_the_booted_deployment,
            usr_is_read_only_and_etc_and_var_are_not,
            the_system_is_marked_as_live,
            a_new_ssh_login_works,
            skopeo_finds_a_node_image_through_the_mirror,
        ],
    )
}

fn systemd_reports_running(live: &mut Live<'_>) -> Result<()> {
    same(live.guest.ask("systemctl is-system-running --wait || systemctl --failed")?, "running".into())
}

fn libostree_lists_the_booted_deployment(live: &mut Live<'_>) -> Result<()> {
    let commit = std::fs::read_to_string(live.boot.join("commit"))?;
    contains(&live.guest.ask("ostree admin status")?, &format!("* testbed {}", commit.trim()))
}

fn usr_is_read_only_and_etc_and_var_are_not(live: &mut Live<'_>) -> Result<()> {
    same(live.guest.run("touch /usr/x")?.status, 1)?;
    same(live.guest.ask("touch /etc/x /var/x && echo yes")?, "yes".into())
}

fn the_system_is_marked_as_live(live: &mut Live<'_>) -> Result<()> {
    live.guest.ask("test -e /run/ostree-live -a -e /run/ostree-booted").map(drop)
}

fn a_new_ssh_login_works(live: &mut Live<'_>) -> Result<()> {
    same(live.guest.login("echo in")?.text.trim().to_string(), "in".into())
}

fn skopeo_finds_a_node_image_through_the_mirror(live: &mut Live<'_>) -> Result<()> {
    let inspect = format!("skopeo inspect --no-tags docker://{}", live.image.by_tag());
    contains(&live.guest.ask(&inspect)?, "ostree.final-diffid")
}

/// Words of which one is in the reason: the mirror refuses the connection, and DNS does not have the registry behind it.
const UNREACHABLE: [&str; 6] = ["refused", "lookup", "resolution", "unreachable", "resolve host", "no such host"];

/// Runs the scenarios about a machine whose registry cannot be reached: it waits in the pivot target and says why.
pub fn waits_and_says_why(suite: &mut Suite, earlier: Option<&str>, mut guest: &dyn Guest) -> bool {
    suite.covers(guest, Flow::Bootstrap, "waits_and_says_why");
    let list = scenarios![
        status_has_the_reason_and_the_next_attempt_while_the_registry_is_down,
        the_machine_stays_in_the_pivot_target_while_the_registry_is_down,
        systemctl_status_has_the_reason_while_the_registry_is_down,
        the_console_has_the_reason_while_the_registry_is_down,
    ];
    match earlier {
        Some(earlier) => suite.run_after(earlier, &mut guest, &list),
        None => suite.run(&mut guest, &list),
    }
}

fn status_has_the_reason_and_the_next_attempt_while_the_registry_is_down(guest: &mut AnyGuest<'_>) -> Result<()> {
    wait_for("state waiting", Duration::from_secs(180), || Ok(guest.status()?["error"]["message"].is_string()))?;
    let status = guest.status()?;
    contains_any(status["error"]["message"].as_str().unwrap_or_default(), &UNREACHABLE)?;
    if status["error"]["next_retry_unix"].as_f64().is_none() && status["state"] == "waiting" {
        bail!("no next attempt: {status}");
    }
    Ok(())
}

fn the_machine_stays_in_the_pivot_target_while_the_registry_is_down(guest: &mut AnyGuest<'_>) -> Result<()> {
    // A target is inactive until all units that it wants have started; its queued job shows that it is being started.
    contains(&guest.ask("systemctl list-jobs --no-legend")?, "node-image-pivot.target")?;
    contains(&guest.ask("readlink /run/systemd/generator.early/default.target")?, "node-image-pivot.target")?;
    unit_is(*guest, "node-image-pull.service", "activating")?;
    unit_is(*guest, "multi-user.target", "inactive")
}

fn systemctl_status_has_the_reason_while_the_registry_is_down(guest: &mut AnyGuest<'_>) -> Result<()> {
    // The unit polls the agent twice a second, so its text is a moment older than the agent's status.
    wait_for("the reason in systemctl status", Duration::from_secs(180), || {
        let answer = guest.run("systemctl status --no-pager -l node-image-pull.service")?;
        contains_any(&answer.text, &UNREACHABLE).map(|()| true)
    })
}

fn the_console_has_the_reason_while_the_registry_is_down(guest: &mut AnyGuest<'_>) -> Result<()> {
    wait_for("the reason on the console", Duration::from_secs(180), || {
        contains_any(&guest.console(), &UNREACHABLE).map(|()| true)
    })
}
