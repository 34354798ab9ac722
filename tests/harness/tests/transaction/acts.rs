//! Every act of a switch, a finish and an undo: killed at each, failing at each.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::proc::{succeed, wait_for};

use super::SOON;
use super::bed::{Bed, agent_with_failpoints, errno_words, told};

/// What every act is made to fail with.
const ERRORS: [&str; 2] = ["enospc", "eio"];

/// Killed between a restart and the note that it was done: the next daemon sees that, and goes on behind it.
#[test]
fn what_was_restarted_is_not_restarted_again() -> Result<()> {
    let mut checks = Checks::new("transaction: a restart is done once");
    let bed = Bed::start("transaction-once", "node-a")?;
    let guest = &bed.guest;
    let unit = "systemd-logind.service";
    // What was there, the plan with the run that each restart ends; the next would be that the first was done.
    guest.ask("printf '[units]\n\"ssh.service\" = \"never\"\n' >/etc/node-image-pivot.conf.d/60-units.toml")?;
    let before = guest.unit(unit, "InvocationID")?;
    guest.ask("echo 'write units.json 2 kill' >/run/failpoints/armed")?;
    checks.check("killed after the restart", || {
        same(bed.killed_in("run")?, true)?;
        if guest.unit(unit, "InvocationID")? == before {
            bail!("it was not restarted");
        }
        same(guest.ask(RECORDED)?, "restart 0".into())
    });
    let once = guest.unit(unit, "InvocationID")?;
    checks.check("the next daemon goes on behind it", || {
        bed.agent("run")?;
        same(guest.unit(unit, "InvocationID")?, once.clone())?;
        same(guest.ask(RECORDED)?, "restart 1".into())?;
        bed.nothing_failed()
    });
    checks.finish()
}

/// Of logind's restart in the record: class, jobs done.
const RECORDED: &str = "jq -r '.acts[] | select(.action.unit == \"systemd-logind.service\") \
    | \"\\(.action.class) \\(.done)\"' /run/node-image-pivot/units.json";

/// The journal, act by act.
#[test]
fn killed_or_failing_at_every_act() -> Result<()> {
    let mut checks = Checks::new("transaction: every failpoint");
    let bed = Bed::start("transaction-acts", "node-a")?;
    let guest = &bed.guest;

    // Once there and back: users that sysusers makes stay, and what the node image's services make for
    // themselves; they are part of what was there from then on.
    bed.agent("run")?;
    bed.agent("finish")?;
    wait_for("the services of the node image", SOON, || {
        Ok(guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0"
            && guest.run("test -d /etc/cni/net.d")?.status == 0)
    })?;
    bed.agent("undo")?;
    let before = bed.etc()?;

    // Once more, to see which points there are, in order.
    guest.ask("systemctl stop node-image-pivotd.service; : >/run/failpoints/hits")?;
    let hits = |part: &str| -> Result<Vec<String>> {
        let text = guest.ask("cat /run/failpoints/hits")?;
        guest.ask("systemctl stop node-image-pivotd.service; : >/run/failpoints/hits")?;
        checks_note(&text, part);
        Ok(text.lines().map(str::to_owned).collect())
    };
    // From the beginning, as after a failure.
    guest.ask("rm /run/node-image-pivot/state.json")?;
    bed.agent("run")?;
    let there = hits("there")?;
    let after = bed.etc()?;
    bed.agent("finish")?;
    let finish = hits("finish")?;
    bed.agent("undo")?;
    let back = hits("back")?;
    guest.ask("systemctl stop node-image-pivotd.service; rm /run/failpoints/hits")?;

    checks.check("all points are reached, on the way there or back", || {
        let list = succeed(Command::new(agent_with_failpoints()?).arg("--failpoints"))?;
        let all: BTreeSet<String> = String::from_utf8(list.stdout)?.lines().map(str::to_owned).collect();
        let kinds = there.iter().chain(&finish).chain(&back);
        let kinds = kinds.map(|name| name.split(' ').next().unwrap_or_default().to_owned()).collect();
        same(kinds, all)
    });
    checks.check("there and back again: /etc is the same", || bed.is_undone(&before));
    checks.check("what the refresh made of files is made anew on the way back, before units are restarted", || {
        let at =
            |name: &str| back.iter().position(|point| point == name).with_context(|| format!("not reached: {name}"));
        let order =
            [at("withdraw")?, at("tool ldconfig")?, at("tool udevadm")?, at("reload-bus")?, at("systemd Reexecute")?];
        same(order.is_sorted(), true)
    });

    // Killed at each point in turn: every start goes on with what the record says, and comes to the next.
    guest.ask("rm /run/node-image-pivot/state.json")?;
    const REEXECUTE: &str = "systemd Reexecute";
    for point in &there {
        // Since the first kill with the new /usr the guard has re-executed PID 1; what is left is a reload.
        let point = if point == REEXECUTE { "systemd Reload" } else { point };
        checks.check(&format!("kill -9, switch: {point}"), || {
            bed.arm(point, "kill")?;
            if !bed.killed_in("run")? {
                bail!("not reached: {}", guest.ask("cat /run/asked")?);
            }
            bed.consistent()
        });
    }
    checks.check("killed everywhere, it is switched all the same", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("run")?;
        bed.is_switched(&after)
    });
    checks.check("killed before it re-executed PID 1, it has a guard who does", || {
        guest.ask("grep -q libsystemd-shared-257 /proc/1/maps").map(drop)
    });
    for point in &finish {
        checks.check(&format!("kill -9, finish: {point}"), || {
            bed.arm(point, "kill")?;
            if !bed.killed_in("finish")? {
                bail!("not reached: {}", guest.ask("cat /run/asked")?);
            }
            bed.consistent()
        });
    }
    checks.check("killed there, too, it is finished all the same", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("finish")?;
        same(bed.step()?, "finished".into())
    });
    for point in &back {
        checks.check(&format!("kill -9, undo: {point}"), || {
            bed.arm(point, "kill")?;
            if !bed.killed_in("undo")? {
                bail!("not reached: {}", guest.ask("cat /run/asked")?);
            }
            bed.consistent()
        });
    }
    checks.check("killed everywhere, it is undone all the same", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("undo")?;
        bed.is_undone(&before)
    });

    checks.check(&format!("kill -9, switch: {REEXECUTE}, and nowhere before"), || {
        bed.arm(REEXECUTE, "kill")?;
        same(bed.killed_in("run")?, true)?;
        bed.consistent()?;
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("run")?;
        bed.is_switched(&after)?;
        bed.agent("undo").map(drop)
    });
    guest.ask("systemctl stop node-image-pivotd.service; rm /run/node-image-pivot/state.json")?;
    // Each act fails, before the switch and in it: the system is as before. After it: all is switched.
    for point in &there {
        for action in ERRORS {
            checks.check(&format!("{action}, switch: {point}"), || {
                bed.arm(point, action)?;
                let answer = guest.run("node-image-pivot run")?;
                same(bed.acted()?, true)?;
                told(&bed, &answer, action)?;
                bed.consistent()?;
                if bed.step()? == "idle" {
                    return bed.is_as_before(&before);
                }
                if answer.status != 0 {
                    contains(&answer.text, "/usr and /etc are switched")?;
                    // The next error comes in the call that goes on.
                    if action != ERRORS[1] {
                        return Ok(());
                    }
                    bed.agent("run")?;
                }
                bed.is_switched(&after)?;
                bed.agent("undo").map(drop)
            });
        }
    }
    checks.check("after all that: switched", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("run")?;
        bed.is_switched(&after)
    });
    let isolated =
        || wait_for("the isolate", SOON, || Ok(guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0"));
    for point in &finish {
        for action in ERRORS {
            checks.check(&format!("{action}, finish: {point}"), || {
                if bed.step()? == "finished" {
                    bed.agent("undo")?;
                    bed.agent("run")?;
                }
                bed.arm(point, action)?;
                let answer = guest.run("node-image-pivot finish")?;
                same(bed.acted()?, true)?;
                told(&bed, &answer, action)?;
                if answer.status == 0 {
                    // About a unit: a warning. Should it be networkd, its newer helper fails with it.
                    same(bed.step()?, "finished".into())?;
                    isolated()?;
                    guest.run("systemctl reset-failed systemd-networkd-persistent-storage.service")?;
                } else {
                    contains(&answer.text, "node-image-finish.service")?;
                    same(bed.step()?, "refreshed".into())?;
                }
                bed.consistent()
            });
        }
    }
    checks.check("after all that: finished", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("finish")?;
        same(bed.step()?, "finished".into())?;
        bed.is_switched(&after)
    });
    for point in &back {
        for action in ERRORS {
            checks.check(&format!("{action}, undo: {point}"), || {
                if bed.step()? == "staged" {
                    bed.agent("run")?;
                    // Only what a finish stopped is started again.
                    if point == "systemd StartUnit" {
                        bed.agent("finish")?;
                        isolated()?;
                    }
                    // Something to be stopped: nothing was isolated this time.
                    guest.ask("systemctl start kubelet.service")?;
                }
                bed.arm(point, action)?;
                let answer = guest.run("node-image-pivot undo")?;
                same(bed.acted()?, true)?;
                // At the end the record replaces one for which there is no room.
                if point != "record staged" {
                    contains(&answer.text, errno_words(action))?;
                }
                bed.consistent()?;
                if answer.status != 0 {
                    // The next error comes in the call that goes on.
                    if action != ERRORS[1] {
                        return Ok(());
                    }
                    bed.agent("undo")?;
                }
                bed.is_undone(&before)
            });
        }
    }
    checks.check("after all that: undone", || {
        guest.ask("rm -f /run/failpoints/armed")?;
        bed.agent("undo")?;
        bed.is_as_before(&before)
    });
    checks.finish()
}

fn checks_note(text: &str, part: &str) {
    println!("  --   {part}: {} points: {}", text.lines().count(), text.trim().replace('\n', ", "));
}
