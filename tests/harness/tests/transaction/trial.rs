//! `run --try`: the switch is undone in time, whatever happens to the agent, unless it is kept.

use anyhow::{Context, Result, bail};
use testbed::check::{contains, same};
use testbed::guest::Guest;
use testbed::proc::wait_for;
use testbed::scenario::unit_is;
use testbed::scenarios;
use testbed::suite::Suite;

use super::bed::Bed;
use super::{KILL_IT, LIMIT, SOON};

/// A container that has been switched and undone once, because users that sysusers makes stay, and its /etc since then.
struct Trial {
    bed: Bed,
    before: String,
}

#[test]
fn a_trial_is_undone_unless_it_is_kept() -> Result<()> {
    let mut suite = Suite::new("transaction: run --try and keep");
    let mut bed = Bed::start("transaction-try", "node-b")?;
    suite.run(&mut bed, &scenarios![keep_before_a_switch_is_refused]);
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    let mut trial = Trial { bed, before };
    suite.run(
        &mut trial,
        &scenarios![
            status_property_and_record_have_the_end_of_the_trial_period,
            the_next_agent_undoes_a_trial_of_a_killed_one
                after status_property_and_record_have_the_end_of_the_trial_period,
            a_trial_is_undone_when_systemd_refuses_to_start_the_agent,
            an_agent_that_is_killed_in_that_undo_is_started_again,
        ],
    );
    let points = ["write node-image-pivot-try.service", "systemd StartUnit"];
    suite.each("a_trial_without_a_timer_is_not_begun", None, &mut trial, points.map(|p| (p, p)), not_begun);
    suite.run(
        &mut trial,
        &scenarios![
            a_kept_switch_stays_after_a_restart_of_the_agent_and_after_the_trial_period,
            a_trial_of_a_kept_switch_is_refused_and_an_undo_is_not
                after a_kept_switch_stays_after_a_restart_of_the_agent_and_after_the_trial_period,
            an_invalid_duration_is_wrong_usage,
        ],
    );
    suite.finish()
}

fn keep_before_a_switch_is_refused(bed: &mut Bed) -> Result<()> {
    let answer = bed.guest.run("node-image-pivot keep")?;
    same(answer.status, 10)?;
    contains(&answer.text, "nothing to keep")
}

fn status_property_and_record_have_the_end_of_the_trial_period(trial: &mut Trial) -> Result<()> {
    let guest = &trial.bed.guest;
    trial.bed.agent("run --try 10m")?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    contains(&trial.bed.agent("status")?, "unless kept")?;
    let at = guest.status()?["undo_unix"].as_u64().context("no undo_unix")?;
    let now: u64 = guest.ask("date +%s")?.parse()?;
    if !(now..=now + 600).contains(&at) {
        bail!("it is {now}, undone at {at}");
    }
    let property =
        guest.ask("busctl get-property org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1 UndoAt")?;
    same(property, format!("t {at}"))
}

fn the_next_agent_undoes_a_trial_of_a_killed_one(trial: &mut Trial) -> Result<()> {
    let guest = &trial.bed.guest;
    guest.ask(&format!("{KILL_IT}; kill_it"))?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    trial.bed.end_trial_period()?;
    wait_for("the undo", SOON, || Ok(guest.status()?["state"] == "pulled"))?;
    same(guest.status()?["undo_unix"].as_u64(), None)?;
    trial.bed.is_as_before(&trial.before)
}

/// The unit of the test has Restart=no, and systemd refuses to start an agent that has died too often.
fn a_trial_is_undone_when_systemd_refuses_to_start_the_agent(trial: &mut Trial) -> Result<()> {
    let guest = &trial.bed.guest;
    // Long enough for the acts before its end, also on a slow machine.
    trial.bed.agent("run --try 40s")?;
    same(timers(guest)?, "1".into())?;
    guest.ask(&format!(
        "mkdir -p $(dirname {LIMIT}) && printf '[Unit]\\nStartLimitIntervalSec=1h\\nStartLimitBurst=1\\n' >{LIMIT}
         {KILL_IT}
         systemctl daemon-reload; kill_it
         systemctl start node-image-pivotd.service; kill_it
         ! systemctl start node-image-pivotd.service"
    ))?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    unit_is(guest, "node-image-pivotd.service", "failed")?;
    wait_for("the undo", SOON, || Ok(guest.run("base-tool")?.text.trim() == "base-tool 1.0"))?;
    wait_undone(trial, SOON)
}

fn an_agent_that_is_killed_in_that_undo_is_started_again(trial: &mut Trial) -> Result<()> {
    trial.bed.guest.ask(&format!("rm {LIMIT}; systemctl daemon-reload"))?;
    trial.bed.arm("etc-revert", "kill")?;
    trial.bed.agent("run --try 15s")?;
    wait_for("the death of the agent", SOON, || trial.bed.acted())?;
    wait_undone(trial, 2 * SOON)
}

fn wait_undone(trial: &Trial, limit: std::time::Duration) -> Result<()> {
    wait_for("the undo's end", limit, || Ok(trial.bed.step()? == "staged"))?;
    wait_for("the timer's end", SOON, || Ok(timers(&trial.bed.guest)? == "0"))?;
    trial.bed.is_as_before(&trial.before)
}

fn not_begun(trial: &mut Trial, point: &&str) -> Result<()> {
    trial.bed.arm(point, "enospc")?;
    let answer = trial.bed.guest.run("node-image-pivot run --try 10m")?;
    same(trial.bed.acted()?, true)?;
    same(answer.status, 1)?;
    contains(&answer.text, "cannot start the timer that ends the trial period")?;
    contains(&answer.text, "the running system is unchanged")?;
    same(timers(&trial.bed.guest)?, "0".into())?;
    trial.bed.is_as_before(&trial.before)
}

fn a_kept_switch_stays_after_a_restart_of_the_agent_and_after_the_trial_period(trial: &mut Trial) -> Result<()> {
    let (bed, guest) = (&trial.bed, &trial.bed.guest);
    bed.agent("run --try 10m")?;
    contains(&bed.agent("keep")?, "the switch stays")?;
    contains(&bed.agent("keep")?, "kept already")?;
    same(timers(guest)?, "0".into())?;
    bed.end_trial_period()?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    same(guest.status()?["undo_unix"].as_u64(), None)
}

fn a_trial_of_a_kept_switch_is_refused_and_an_undo_is_not(trial: &mut Trial) -> Result<()> {
    let answer = trial.bed.guest.run("node-image-pivot run --try 10m")?;
    same(answer.status, 10)?;
    contains(&answer.text, "switched already")?;
    trial.bed.agent("undo")?;
    trial.bed.is_as_before(&trial.before)?;
    same(trial.bed.guest.run("node-image-pivot keep")?.status, 10)
}

fn an_invalid_duration_is_wrong_usage(trial: &mut Trial) -> Result<()> {
    same(trial.bed.guest.run("node-image-pivot run --try soon")?.status, 2)
}

/// Returns the number of timers that wait for the end of a trial period; files and units must agree.
fn timers(guest: &dyn Guest) -> Result<String> {
    let loaded = guest.ask("systemctl list-timers --all --no-legend 'node-image-pivot-try-*' | wc -l")?;
    same(guest.ask("ls /run/systemd/system | grep -c 'node-image-pivot-try-.*timer' || true")?, loaded.clone())?;
    Ok(loaded)
}
