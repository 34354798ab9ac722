//! The agent in the hands of an operator: stop, kill, fix the configuration, undo. On a real systemd in a container.
//! `make check-one NAME=agent`

mod complete;
mod local_images;
mod support_case;

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;
use testbed::check::{contains, contains_any, nothing_failed, same};
use testbed::container::{Bed, Serving};
use testbed::guest::Guest;
use testbed::images::Images;
use testbed::proc::wait_for;
use testbed::scenario::{configured_later, unit_is, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;

use local_images::carry_a_newer_skopeo;
use support_case::{
    a_bus_caller_that_leaves_takes_its_pull_with_it, answers_are_documents, gather_writes_one_archive_for_root,
    status_exits_like_the_call_that_failed, the_units_journal_has_a_begin_and_an_end_that_the_catalog_explains,
};

const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);

fn state(guest: &dyn Guest) -> Result<String> {
    Ok(guest.status()?["state"].as_str().unwrap_or_default().to_owned())
}

fn wait_state(guest: &dyn Guest, wanted: &str) -> Result<()> {
    wait_for(wanted, SOON, || Ok(state(guest)? == wanted))
}

fn the_machine_becomes_its_node_image(bed: &mut Bed) -> Result<()> {
    wait_pivoted(&bed.guest, PIVOT)
}

fn no_unit_has_failed(bed: &mut Bed) -> Result<()> {
    nothing_failed(&bed.guest)
}

/// The image is the wrong one at first: the corrected configuration is enough, and the daemon is not restarted.
#[test]
fn a_wrong_image_is_corrected() -> Result<()> {
    let mut suite = Suite::new("agent: a wrong image is corrected");
    let mut bed = Bed::boot("agent-correct", "plain", Serving::AtBoot, |_| Ok(()))?;
    suite.run(
        &mut bed,
        &scenarios![
            a_wrong_image_fails_the_pull_permanently,
            the_units_journal_has_a_begin_and_an_end_that_the_catalog_explains
                after a_wrong_image_fails_the_pull_permanently,
            status_has_the_reason_with_and_without_the_daemon after a_wrong_image_fails_the_pull_permanently,
            a_plan_fails_with_the_documented_exit_code,
            a_wrong_key_in_the_configuration_is_refused_by_name,
            a_corrected_image_is_pulled_when_the_last_unit_starts,
            no_unit_has_failed,
        ],
    );
    suite.finish()
}

fn a_wrong_image_fails_the_pull_permanently(bed: &mut Bed) -> Result<()> {
    bed.guest.wait_unit("node-image-pull.service", "failed", SOON)
}

fn status_has_the_reason_with_and_without_the_daemon(bed: &mut Bed) -> Result<()> {
    contains(&bed.guest.ask("node-image-pivot status")?, "is not an operating system")?;
    bed.guest.ask("systemctl stop node-image-pivotd.service")?;
    contains(&bed.guest.ask("node-image-pivot status")?, "is not an operating system")
}

fn a_plan_fails_with_the_documented_exit_code(bed: &mut Bed) -> Result<()> {
    same(bed.guest.run("node-image-pivot plan")?.status, 11)
}

fn a_wrong_key_in_the_configuration_is_refused_by_name(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask(
        "cp -a /etc/node-image-pivot.conf.d /run/conf && echo 'imgae = 1' >/etc/node-image-pivot.conf.d/90-x.toml",
    )?;
    let answer = guest.run("node-image-pivot plan")?;
    same(answer.status, 10)?;
    contains(&answer.text, "90-x.toml")?;
    guest.ask("rm /etc/node-image-pivot.conf.d/90-x.toml").map(drop)
}

fn a_corrected_image_is_pulled_when_the_last_unit_starts(bed: &mut Bed) -> Result<()> {
    let (guest, right) = (&bed.guest, Images::ensure()?.image("node-b")?.by_digest());
    guest.ask(&format!("sed -i 's#^image = .*#image = \"{right}\"#' /etc/node-image-pivot.conf.d/*.toml"))?;
    guest.ask("systemctl start --no-block node-image-finish.service")?;
    wait_for("the end of the old failure", SOON, || Ok(state(guest)? != "failed"))?;
    wait_pivoted(guest, PIVOT)?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())
}

const KILL: &str = "systemctl kill -s KILL node-image-pivotd.service";

/// The daemon is killed while it waits, while it pulls and after the switch.
#[test]
fn a_killed_daemon_goes_on() -> Result<()> {
    let mut suite = Suite::new("agent: kill -9");
    let mut bed = Bed::boot("agent-kill", "node-a", Serving::Later, |_| Ok(()))?;
    suite.run(
        &mut bed,
        &scenarios![
            a_daemon_that_is_killed_while_it_waits_waits_again,
            a_daemon_is_killed_in_the_middle_of_the_pull,
            the_machine_becomes_its_node_image,
            a_daemon_that_is_killed_after_the_pivot_knows_that_it_is_done after the_machine_becomes_its_node_image,
            one_mount_of_the_node_image_covers_usr,
            no_unit_has_failed,
        ],
    );
    suite.finish()
}

fn a_daemon_that_is_killed_while_it_waits_waits_again(bed: &mut Bed) -> Result<()> {
    wait_state(&bed.guest, "waiting")?;
    bed.guest.ask(KILL)?;
    wait_state(&bed.guest, "waiting")?;
    unit_is(&bed.guest, "node-image-pull.service", "activating")
}

fn a_daemon_is_killed_in_the_middle_of_the_pull(bed: &mut Bed) -> Result<()> {
    bed.registry.resume()?;
    wait_for("objects", SOON, || Ok(bed.guest.status()?["progress"]["objects_done"].as_u64() > Some(0)))?;
    bed.guest.ask(KILL).map(drop)
}

fn a_daemon_that_is_killed_after_the_pivot_knows_that_it_is_done(bed: &mut Bed) -> Result<()> {
    bed.guest.ask(KILL)?;
    wait_state(&bed.guest, "done")?;
    contains(&bed.guest.ask("node-image-pivot run")?, "nothing to do")
}

fn one_mount_of_the_node_image_covers_usr(bed: &mut Bed) -> Result<()> {
    same(bed.guest.ask("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?, "1".into())
}

/// A caller that goes away does not find the machine switched hours later.
#[test]
fn a_call_ends_with_its_caller() -> Result<()> {
    let mut suite = Suite::new("agent: stop and cancel");
    let mut bed = Bed::boot("agent-stop", "node-b", Serving::Later, carry_a_newer_skopeo)?;
    wait_state(&bed.guest, "waiting")?;
    suite.run(
        &mut bed,
        &scenarios![
            systemctl_stop_ends_the_pull,
            cancel_reports_that_nothing_was_running after systemctl_stop_ends_the_pull,
            a_bus_caller_that_leaves_takes_its_pull_with_it,
            status_exits_like_the_call_that_failed after a_bus_caller_that_leaves_takes_its_pull_with_it,
            answers_are_documents,
            gather_writes_one_archive_for_root,
            cancel_ends_a_call_which_exits_with_its_own_code,
            nothing_happens_when_the_registry_is_back after cancel_ends_a_call_which_exits_with_its_own_code,
            undo_reports_that_nothing_was_switched,
            mode_off_refuses_a_run,
        ],
    );
    local_images::run(&mut suite, &mut bed);
    suite.finish()
}

fn systemctl_stop_ends_the_pull(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("systemctl stop node-image-finish.service node-image-overlay.service node-image-pull.service")?;
    wait_state(&bed.guest, "failed")?;
    contains(&bed.guest.ask("node-image-pivot status")?, "cancelled")?;
    same(bed.guest.unit("node-image-pull.service", "ExecMainStatus")?, "12".into())?;
    contains(&support_case::end_of_the_pull(&bed.guest)?, "node-image-pull.service was cancelled")
}

fn cancel_reports_that_nothing_was_running(bed: &mut Bed) -> Result<()> {
    contains(&bed.guest.ask("node-image-pivot cancel")?, "nothing was running")
}

fn cancel_ends_a_call_which_exits_with_its_own_code(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("systemd-run --unit=asked node-image-pivot overlay")?;
    wait_state(guest, "waiting")?;
    let answer: Value = serde_json::from_str(&guest.ask("node-image-pivot cancel --json")?)?;
    same(answer["state"].to_string(), r#""failed""#.into())?;
    contains(&answer["lines"].to_string(), "cancelled")?;
    guest.wait_unit("asked.service", "failed", SOON)?;
    same(guest.unit("asked.service", "ExecMainStatus")?, "12".into())
}

fn nothing_happens_when_the_registry_is_back(bed: &mut Bed) -> Result<()> {
    bed.registry.resume()?;
    let guest = &bed.guest;
    // No call runs in the agent and no attempt is scheduled, so nothing can begin later.
    contains(&guest.ask("node-image-pivot cancel")?, "nothing was running")?;
    same(guest.status()?["error"]["next_retry_unix"].as_f64(), None)?;
    same(state(guest)?, "failed".into())?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn undo_reports_that_nothing_was_switched(bed: &mut Bed) -> Result<()> {
    let answer = bed.guest.run("node-image-pivot undo")?;
    same(answer.status, 10)?;
    contains(&answer.text, "nothing was switched")
}

fn mode_off_refuses_a_run(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("echo 'mode = \"off\"' >/etc/node-image-pivot.conf.d/90-off.toml")?;
    let answer = bed.guest.run("node-image-pivot run")?;
    same(answer.status, 10)?;
    contains(&answer.text, "off")
}

/// All of /etc but caches that ldconfig and systemd write and users that sysusers makes: an undo keeps those.
const FINGERPRINT: &str = "cd /etc; find . -xdev \\( -type f -o -type l \\) ! -name ld.so.cache ! -name .updated ! -name '*passwd*' \
    ! -name '*group*' ! -name '*shadow*' ! -name .pwd.lock -printf '%p %m %u %g %l\\n' | sort | sha256sum; \
    find . -xdev -type f ! -name ld.so.cache ! -name .updated ! -name '*passwd*' ! -name '*group*' \
    ! -name '*shadow*' -print0 | sort -z | xargs -0 sha256sum | sha256sum";

/// A container, and what it looked like at the beginning.
struct Known {
    bed: Bed,
    before: String,
}

#[test]
fn undo_restores_the_base_system() -> Result<()> {
    let mut suite = Suite::new("agent: undo");
    let bed = Bed::boot("agent-undo", "node-a", Serving::AtBoot, configured_later)?;
    bed.guest.wait_unit("multi-user.target", "active", SOON)?;
    bed.guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    let before = bed.guest.ask(FINGERPRINT)?;
    let mut known = Known { bed, before };
    suite.run(
        &mut known,
        &scenarios![
            pull_complete_before_the_switch_fetches_no_layer_twice,
            plan_shows_the_changes_and_makes_none,
            run_switches_and_isolates_nothing,
            undo_brings_the_old_programs_and_the_old_pid_1_back after run_switches_and_isolates_nothing,
            undo_leaves_etc_unchanged,
            undo_leaves_the_loader_cache_of_the_old_usr,
            a_new_ssh_login_works_after_undo,
            usr_is_not_covered_after_undo_and_the_image_is_still_pulled,
            the_image_can_be_switched_to_again,
        ],
    );
    suite.run(&mut known.bed, &scenarios![no_unit_has_failed]);
    suite.finish()
}

fn pull_complete_before_the_switch_fetches_no_layer_twice(known: &mut Known) -> Result<()> {
    let Bed { guest, registry, .. } = &known.bed;
    contains(&guest.ask("node-image-pivot pull --complete")?, "the node store has all of")?;
    let images = Images::ensure()?;
    let layers = registry.served_of_each(&images.storage, images.image("node-a")?)?;
    same(layers.iter().filter(|(served, size)| served > size).collect::<Vec<_>>(), Vec::new())?;
    same(layers.iter().any(|(served, _)| *served > 0), true)
}

fn plan_shows_the_changes_and_makes_none(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    contains(&guest.ask("node-image-pivot plan")?, "/usr:")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    same(guest.ask(FINGERPRINT)?, known.before.clone())
}

fn the_image_can_be_switched_to_again(known: &mut Known) -> Result<()> {
    let answer = known.bed.guest.run("node-image-pivot run")?;
    if answer.status != 0 {
        bail!("run: {}\n{}", answer.status, answer.text);
    }
    same(known.bed.guest.ask("base-tool")?, "base-tool 2.0".into())
}

fn run_switches_and_isolates_nothing(known: &mut Known) -> Result<()> {
    the_image_can_be_switched_to_again(known)?;
    unit_is(&known.bed.guest, "multi-user.target", "active")
}

fn undo_brings_the_old_programs_and_the_old_pid_1_back(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    let answer: Value = serde_json::from_str(&guest.ask("node-image-pivot undo --json 2>/dev/null")?)?;
    same(answer["state"].to_string(), r#""pulled""#.into())?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    contains_any(&guest.ask("systemctl --version")?, &["systemd 252"])?;
    contains_any(&guest.ask("busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager Version")?, &["252"])
}

fn undo_leaves_etc_unchanged(known: &mut Known) -> Result<()> {
    same(known.bed.guest.ask(FINGERPRINT)?, known.before.clone())
}

fn undo_leaves_the_loader_cache_of_the_old_usr(known: &mut Known) -> Result<()> {
    known.bed.guest.ask("ldconfig -C /run/ld.so.cache && cmp /etc/ld.so.cache /run/ld.so.cache").map(drop)
}

fn a_new_ssh_login_works_after_undo(known: &mut Known) -> Result<()> {
    same(known.bed.guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
}

fn usr_is_not_covered_after_undo_and_the_image_is_still_pulled(known: &mut Known) -> Result<()> {
    let guest = &known.bed.guest;
    same(guest.run("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?.text.trim().into(), "0".to_string())?;
    let status = guest.ask("node-image-pivot status")?;
    contains(&status, "Z switch\n")?;
    contains(&status, "Z undo")?;
    same(state(guest)?, "pulled".into())
}

/// systemd boots into a default target that may not be isolated; the agent starts it as systemd does.
#[test]
fn a_target_that_may_not_be_isolated_is_started() -> Result<()> {
    let mut suite = Suite::new("agent: a target without AllowIsolate=");
    let mut bed = Bed::boot("agent-plain", "node-b", Serving::AtBoot, |files| {
        files.put("/etc/node-image-pivot.conf.d/60-target.toml", 0o644, "target = \"plain.target\"\n")?;
        let target = "[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\n";
        files.put("/etc/systemd/system/plain.target", 0o644, target)
    })?;
    suite.run(
        &mut bed,
        &scenarios![
            a_target_without_allow_isolate_is_reached,
            the_journal_explains_that_it_was_not_isolated,
            no_unit_has_failed
        ],
    );
    suite.finish()
}

fn a_target_without_allow_isolate_is_reached(bed: &mut Bed) -> Result<()> {
    wait_pivoted(&bed.guest, PIVOT)?;
    bed.guest.wait_unit("plain.target", "active", SOON)?;
    same(state(&bed.guest)?, "done".into())
}

fn the_journal_explains_that_it_was_not_isolated(bed: &mut Bed) -> Result<()> {
    contains(&bed.guest.ask("journalctl -b -u node-image-pivotd.service")?, "plain.target cannot be isolated")
}

/// An administrator repairs the machine in rescue.target during the pivot: the agent does not end that session.
#[test]
fn an_administrator_in_rescue_is_not_isolated_away() -> Result<()> {
    let mut suite = Suite::new("agent: rescue during the pivot");
    let mut bed = Bed::boot("agent-rescue", "node-b", Serving::Later, |files| {
        // The test has no administrator at the console.
        let shell = "[Service]\nExecStart=\nExecStart=/usr/bin/sleep infinity\n";
        files.put("/etc/systemd/system/rescue.service.d/50-testbed.conf", 0o644, shell)
    })?;
    wait_state(&bed.guest, "waiting")?;
    bed.guest.ask("systemctl --no-block isolate rescue.target")?;
    bed.guest.wait_unit("rescue.target", "active", SOON)?;
    bed.registry.resume()?;
    suite.run(
        &mut bed,
        &scenarios![
            all_but_the_isolate_is_done_and_status_says_why,
            the_machine_stays_in_rescue,
            leaving_rescue_allows_the_finish,
            no_unit_has_failed,
        ],
    );
    suite.finish()
}

fn all_but_the_isolate_is_done_and_status_says_why(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.wait_unit("node-image-finish.service", "failed", PIVOT)?;
    let status = guest.ask("node-image-pivot status")?;
    contains(&status, "the machine is in rescue.target")?;
    contains(&status, "start node-image-finish.service")?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    unit_is(guest, "node-image-overlay.service", "active")
}

fn the_machine_stays_in_rescue(bed: &mut Bed) -> Result<()> {
    unit_is(&bed.guest, "rescue.target", "active")?;
    unit_is(&bed.guest, "multi-user.target", "inactive")
}

fn leaving_rescue_allows_the_finish(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("systemctl --no-block default")?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("systemctl start node-image-finish.service")?;
    wait_pivoted(guest, SOON)?;
    same(state(guest)?, "done".into())
}
