//! Every act of a switch, a finish and an undo: the agent is killed in each, and each fails.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use testbed::check::{contains, same};
use testbed::container::Root;
use testbed::guest::Guest;
use testbed::proc::{succeed, wait_for};
use testbed::scenarios;
use testbed::suite::Suite;

use super::bed::{Bed, agent_with_failpoints, errno_words, reported};
use super::{SOON, bound};

/// Errors that each act fails with, in this order.
const ERRORS: [&str; 2] = ["enospc", "eio"];
const REEXECUTE: &str = "systemd Reexecute";
/// Writes what only people read: an error of it is logged, and nothing fails.
const TIMELINE: &str = "write timeline.json";

const LOGIND: &str = "systemd-logind.service";
/// Prints the restart of logind in the record: class, jobs done.
const RECORDED: &str = "jq -r '.acts[] | select(.action.unit == \"systemd-logind.service\") \
    | \"\\(.action.class) \\(.done)\"' /run/node-image-pivot/units.json";

/// A container, and the invocation of logind that was seen last.
struct Restart {
    bed: Bed,
    invocation: String,
}

/// The container also shows a complete tree: the kernel accepts no overlay on its /usr.
#[test]
fn a_completed_restart_is_not_repeated() -> Result<()> {
    let mut suite = Suite::new("transaction: a restart is done once, and a complete tree");
    let bed = Bed::on_root(Root::Stacked, "transaction-once", "node-a")?;
    bed.guest.ask("printf '[units]\n\"ssh.service\" = \"never\"\n' >/etc/node-image-pivot.conf.d/60-units.toml")?;
    let invocation = bed.guest.unit(LOGIND, "InvocationID")?;
    let list = scenarios![
        the_agent_is_killed_between_a_restart_and_its_record,
        the_next_agent_goes_on_after_the_restart after the_agent_is_killed_between_a_restart_and_its_record,
    ];
    let mut restart = Restart { bed, invocation };
    suite.run(&mut restart, &list);
    bound::killed(&mut suite, &mut restart.bed)?;
    suite.finish()
}

/// The first two writes of the unit journal are the units before the switch, and the plan with the invocation that each
/// restart ends. The third would record that the first restart is done.
fn the_agent_is_killed_between_a_restart_and_its_record(restart: &mut Restart) -> Result<()> {
    let guest = &restart.bed.guest;
    guest.ask("echo 'write units.json 2 kill' >/run/failpoints/armed")?;
    same(restart.bed.killed_in("run")?, true)?;
    let now = guest.unit(LOGIND, "InvocationID")?;
    if now == restart.invocation {
        bail!("it was not restarted");
    }
    restart.invocation = now;
    same(guest.ask(RECORDED)?, "restart 0".into())
}

fn the_next_agent_goes_on_after_the_restart(restart: &mut Restart) -> Result<()> {
    let guest = &restart.bed.guest;
    restart.bed.agent("run")?;
    same(guest.unit(LOGIND, "InvocationID")?, restart.invocation.clone())?;
    same(guest.ask(RECORDED)?, "restart 1".into())?;
    restart.bed.nothing_failed()
}

/// A container, its /etc before and after the switch, and the failpoints that it reaches, in order.
struct Acts {
    bed: Bed,
    before: String,
    after: String,
    switch: Vec<String>,
    finish: Vec<String>,
    undo: Vec<String>,
}

impl Acts {
    /// Switches, finishes and undoes twice. After the first time, /etc has the users that sysusers makes and the files of
    /// the node image's services. The second time shows which failpoints there are.
    fn survey() -> Result<Self> {
        let bed = Bed::start("transaction-acts", "node-a")?;
        bed.agent("run")?;
        bed.agent("finish")?;
        wait_for("the services of the node image", SOON, || {
            Ok(no_job_runs(&bed)? && bed.guest.run("test -d /etc/cni/net.d")?.status == 0)
        })?;
        bed.agent("undo")?;
        let before = bed.etc()?;
        forget(&bed)?;
        bed.guest.ask(": >/run/failpoints/hits")?;
        bed.agent("run")?;
        let mut switch = hits(&bed, "switch")?;
        let after = bed.etc()?;
        bed.agent("finish")?;
        let finish = hits(&bed, "finish")?;
        bed.agent("undo")?;
        let mut undo = hits(&bed, "undo")?;
        for points in [&mut switch, &mut undo] {
            // Only reached if PID 1 has forgotten units at its re-execution, which is not the same in every run.
            points.retain(|point| point != "systemd Reload");
        }
        bed.guest.ask("systemctl stop node-image-pivotd.service; rm /run/failpoints/hits")?;
        Ok(Acts { bed, before, after, switch, finish, undo })
    }

    fn is_killed(&self, command: &str, point: &str) -> Result<()> {
        self.bed.arm(point, "kill")?;
        if !self.bed.killed_in(command)? {
            bail!("not reached: {}", self.bed.guest.ask("cat /run/asked")?);
        }
        self.bed.consistent()
    }

    fn disarm(&self) -> Result<()> {
        self.bed.guest.ask("rm -f /run/failpoints/armed").map(drop)
    }
}

/// Makes the agent begin again, as after a failure.
fn forget(bed: &Bed) -> Result<()> {
    bed.guest.ask("systemctl stop node-image-pivotd.service; rm /run/node-image-pivot/state.json").map(drop)
}

fn no_job_runs(bed: &Bed) -> Result<bool> {
    Ok(bed.guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0")
}

fn wait_isolated(bed: &Bed) -> Result<()> {
    wait_for("the isolate", SOON, || no_job_runs(bed))
}

/// Returns the failpoints that were reached since the last call, and prints them.
pub fn hits(bed: &Bed, part: &str) -> Result<Vec<String>> {
    let text = bed.guest.ask("cat /run/failpoints/hits")?;
    bed.guest.ask("systemctl stop node-image-pivotd.service; : >/run/failpoints/hits")?;
    println!("       {part}: {} points: {}", text.lines().count(), text.trim().replace('\n', ", "));
    Ok(text.lines().map(str::to_owned).collect())
}

/// Pairs each failpoint with its name.
fn each_point(points: &[String]) -> Vec<(String, String)> {
    points.iter().map(|point| (point.clone(), point.clone())).collect()
}

/// Pairs each failpoint with each error, except that of the timeline.
fn each_error(points: &[String]) -> Vec<(String, (String, &'static str))> {
    let each = |point: &String| ERRORS.map(|error| (format!("{error}: {point}"), (point.clone(), error)));
    points.iter().filter(|point| *point != TIMELINE).flat_map(each).collect()
}

#[test]
fn an_agent_that_is_killed_or_fails_at_any_act_completes_or_undoes_the_switch() -> Result<()> {
    let mut suite = Suite::new("transaction: every failpoint");
    let mut acts = Acts::survey()?;
    suite.run(
        &mut acts,
        &scenarios![
            every_failpoint_is_reached,
            etc_is_unchanged_after_a_switch_and_an_undo,
            caches_are_rebuilt_by_an_undo_before_units_restart,
        ],
    );
    killed(&mut suite, &mut acts);
    failing(&mut suite, &mut acts);
    suite.finish()
}

fn every_failpoint_is_reached(acts: &mut Acts) -> Result<()> {
    let list = succeed(Command::new(agent_with_failpoints()?).arg("--failpoints"))?;
    let all: BTreeSet<String> = String::from_utf8(list.stdout)?.lines().map(str::to_owned).collect();
    let kinds = acts.switch.iter().chain(&acts.finish).chain(&acts.undo);
    let kinds = kinds.map(|name| name.split(' ').next().unwrap_or_default().to_owned()).collect();
    same(kinds, all)
}

fn etc_is_unchanged_after_a_switch_and_an_undo(acts: &mut Acts) -> Result<()> {
    acts.bed.is_undone(&acts.before)
}

fn caches_are_rebuilt_by_an_undo_before_units_restart(acts: &mut Acts) -> Result<()> {
    let at =
        |name: &str| acts.undo.iter().position(|point| point == name).with_context(|| format!("not reached: {name}"));
    let order = [at("withdraw")?, at("tool ldconfig")?, at("tool udevadm")?, at("reload-bus")?, at(REEXECUTE)?];
    same(order.is_sorted(), true)
}

/// Kills the agent at each failpoint in turn. Each start goes on from the record, and comes to the next one.
fn killed(suite: &mut Suite, acts: &mut Acts) {
    // Since the first kill with the new /usr, the guard has re-executed PID 1; what remains is a reload.
    let reload = |point: String| if point == REEXECUTE { "systemd Reload".to_owned() } else { point };
    let points: Vec<_> = each_point(&acts.switch).into_iter().map(|(label, point)| (label, reload(point))).collect();
    suite.run(acts, &scenarios![the_agent_begins_again]);
    suite.each("killed_in_a_switch", None, acts, points, |acts, point| acts.is_killed("run", point));
    suite.run(
        acts,
        &scenarios![
            a_switch_that_was_killed_at_every_act_is_completed,
            a_switch_that_was_killed_before_the_re_execution_has_a_guard_that_does_it,
        ],
    );
    let points = each_point(&acts.finish);
    suite.each("killed_in_a_finish", None, acts, points, |acts, point| acts.is_killed("finish", point));
    suite.run(acts, &scenarios![a_finish_that_was_killed_at_every_act_is_completed]);
    let points = each_point(&acts.undo);
    suite.each("killed_in_an_undo", None, acts, points, |acts, point| acts.is_killed("undo", point));
    suite.run(
        acts,
        &scenarios![
            an_undo_that_was_killed_at_every_act_is_completed,
            a_switch_that_is_killed_at_the_re_execution_only_is_completed_and_undone,
            each_step_is_listed_before_it_begins,
        ],
    );
}

fn the_agent_begins_again(acts: &mut Acts) -> Result<()> {
    forget(&acts.bed)
}

fn a_switch_that_was_killed_at_every_act_is_completed(acts: &mut Acts) -> Result<()> {
    acts.disarm()?;
    acts.bed.agent("run")?;
    acts.bed.is_switched(&acts.after)
}

fn a_switch_that_was_killed_before_the_re_execution_has_a_guard_that_does_it(acts: &mut Acts) -> Result<()> {
    acts.bed.guest.ask("grep -q libsystemd-shared-257 /proc/1/maps").map(drop)
}

fn a_finish_that_was_killed_at_every_act_is_completed(acts: &mut Acts) -> Result<()> {
    acts.disarm()?;
    acts.bed.agent("finish")?;
    same(acts.bed.step()?, "finished".into())
}

fn an_undo_that_was_killed_at_every_act_is_completed(acts: &mut Acts) -> Result<()> {
    acts.disarm()?;
    acts.bed.agent("undo")?;
    acts.bed.is_undone(&acts.before)
}

fn a_switch_that_is_killed_at_the_re_execution_only_is_completed_and_undone(acts: &mut Acts) -> Result<()> {
    acts.bed.arm(REEXECUTE, "kill")?;
    same(acts.bed.killed_in("run")?, true)?;
    acts.bed.consistent()?;
    acts.disarm()?;
    acts.bed.agent("run")?;
    acts.bed.is_switched(&acts.after)?;
    acts.bed.agent("undo").map(drop)
}

/// The first hit of a new switch is the record without a step. An agent that goes on lists the steps again.
fn each_step_is_listed_before_it_begins(acts: &mut Acts) -> Result<()> {
    let (bed, guest) = (&acts.bed, &acts.bed.guest);
    for (skip, begun) in [(1, ""), (1, "ref"), (2, "ref marker"), (3, "ref marker usr")] {
        guest.ask(&format!("echo 'record switching {skip} kill' >/run/failpoints/armed"))?;
        same(bed.killed_in("run")?, true)?;
        same(guest.ask("jq -r '.begun // [] | join(\" \")' /run/node-image-pivot/state.json")?, begun.into())?;
    }
    bed.agent("run")?;
    bed.is_switched(&acts.after)?;
    bed.agent("undo").map(drop)
}

/// Makes each act fail. Before the switch and in it, the system is unchanged; after it, the system is switched.
fn failing(suite: &mut Suite, acts: &mut Acts) {
    suite.run(acts, &scenarios![a_timeline_that_cannot_be_written_changes_nothing, the_agent_begins_again]);
    let rows = each_error(&acts.switch);
    suite.each("an_error_in_a_switch", None, acts, rows, |acts, (point, error)| fails_in_a_switch(acts, point, error));
    suite.run(acts, &scenarios![a_switch_after_all_errors_is_complete]);
    let rows = each_error(&acts.finish);
    suite.each("an_error_in_a_finish", None, acts, rows, |acts, (point, error)| fails_in_a_finish(acts, point, error));
    suite.run(acts, &scenarios![a_finish_after_all_errors_is_complete]);
    let rows = each_error(&acts.undo);
    suite.each("an_error_in_an_undo", None, acts, rows, |acts, (point, error)| fails_in_an_undo(acts, point, error));
    suite.run(acts, &scenarios![an_undo_after_all_errors_is_complete]);
}

fn a_timeline_that_cannot_be_written_changes_nothing(acts: &mut Acts) -> Result<()> {
    let bed = &acts.bed;
    bed.arm(TIMELINE, ERRORS[0])?;
    bed.agent("run")?;
    same(bed.acted()?, true)?;
    contains(&bed.guest.ask("journalctl -u node-image-pivotd.service -o cat")?, errno_words(ERRORS[0]))?;
    bed.is_switched(&acts.after)?;
    bed.agent("undo").map(drop)
}

fn fails_in_a_switch(acts: &Acts, point: &str, error: &str) -> Result<()> {
    let bed = &acts.bed;
    bed.arm(point, error)?;
    let answer = bed.guest.run("node-image-pivot run")?;
    same(bed.acted()?, true)?;
    reported(bed, &answer, error)?;
    bed.consistent()?;
    if bed.step()? == "idle" {
        return bed.is_as_before(&acts.before);
    }
    if answer.status != 0 {
        contains(&answer.text, "/usr and /etc are switched")?;
        // The next error comes in the call that goes on.
        if error != ERRORS[1] {
            return Ok(());
        }
        bed.agent("run")?;
    }
    bed.is_switched(&acts.after)?;
    bed.agent("undo").map(drop)
}

fn a_switch_after_all_errors_is_complete(acts: &mut Acts) -> Result<()> {
    a_switch_that_was_killed_at_every_act_is_completed(acts)
}

fn fails_in_a_finish(acts: &Acts, point: &str, error: &str) -> Result<()> {
    let bed = &acts.bed;
    if bed.step()? == "finished" {
        bed.agent("undo")?;
        bed.agent("run")?;
    }
    bed.arm(point, error)?;
    let answer = bed.guest.run("node-image-pivot finish")?;
    same(bed.acted()?, true)?;
    reported(bed, &answer, error)?;
    if answer.status == 0 {
        // An error about a unit is a warning. If the unit is networkd, its newer helper fails with it.
        same(bed.step()?, "finished".into())?;
        wait_isolated(bed)?;
        bed.guest.run("systemctl reset-failed systemd-networkd-persistent-storage.service")?;
    } else {
        contains(&answer.text, "node-image-finish.service")?;
        same(bed.step()?, "refreshed".into())?;
    }
    bed.consistent()
}

fn a_finish_after_all_errors_is_complete(acts: &mut Acts) -> Result<()> {
    a_finish_that_was_killed_at_every_act_is_completed(acts)?;
    acts.bed.is_switched(&acts.after)
}

fn fails_in_an_undo(acts: &Acts, point: &str, error: &str) -> Result<()> {
    let bed = &acts.bed;
    if bed.step()? == "staged" {
        switch_again(bed, point)?;
    }
    bed.arm(point, error)?;
    let answer = bed.guest.run("node-image-pivot undo")?;
    same(bed.acted()?, true)?;
    // The last record replaces one for which there is no room.
    if point != "record staged" {
        contains(&answer.text, errno_words(error))?;
    }
    bed.consistent()?;
    if answer.status != 0 {
        // The next error comes in the call that goes on.
        if error != ERRORS[1] {
            return Ok(());
        }
        bed.agent("undo")?;
    }
    bed.is_undone(&acts.before)
}

/// Switches so that an undo reaches `point`.
fn switch_again(bed: &Bed, point: &str) -> Result<()> {
    bed.agent("run")?;
    // An undo starts only units that a finish has stopped.
    if point == "systemd StartUnit" {
        bed.agent("finish")?;
        wait_isolated(bed)?;
    }
    // Without an isolate, this is the unit that the undo stops.
    bed.guest.ask("systemctl start kubelet.service").map(drop)
}

fn an_undo_after_all_errors_is_complete(acts: &mut Acts) -> Result<()> {
    acts.disarm()?;
    acts.bed.agent("undo")?;
    acts.bed.is_as_before(&acts.before)
}
