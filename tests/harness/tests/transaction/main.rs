//! The switch is a transaction: killed or failing at every act, it is finished or undone, never half done. On a
//! real systemd in a container, with an agent that has failpoints (src/failpoint.rs).
//! `cargo test -p testbed --test transaction -- --test-threads=1 --nocapture`

mod acts;
mod bed;
mod ways;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::images::{project, work_dir};
use testbed::proc::{succeed, wait_for};

use bed::{Bed, agent_with_failpoints};

const SOON: Duration = Duration::from_secs(60);
/// Where a test says how often the agent may be started.
const LIMIT: &str = "/run/systemd/system/node-image-pivotd.service.d/limit.conf";

#[test]
fn what_is_shipped_has_no_failpoints() -> Result<()> {
    const MARK: &[u8] = b"NODE_IMAGE_PIVOT_FAILPOINTS";
    let has = |path: &PathBuf| -> Result<bool> {
        let program = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(program.windows(MARK.len()).any(|bytes| bytes == MARK))
    };
    let with = agent_with_failpoints()?;
    same(has(&with)?, true)?;
    let guest_tree = work_dir("transaction-shipped")?;
    succeed(
        Command::new("make")
            .args(["-s", "-C"])
            .arg(project())
            .arg("install")
            .arg(format!("DESTDIR={}", guest_tree.display())),
    )?;
    same(has(&guest_tree.join("usr/bin/node-image-pivot"))?, false)
}

/// No room for the files: refused with numbers before anything happens; none for the record: rolled back.
#[test]
fn no_room() -> Result<()> {
    let mut checks = Checks::new("transaction: full file systems");
    let bed = Bed::start("transaction-room", "node-b")?;
    let guest = &bed.guest;
    // An /etc whose size can be set, as that of /run can.
    guest.ask(
        "mkdir /run/small && mount -t tmpfs -o size=64m,mode=0755 small /run/small && cp -a /etc/. /run/small/ \
         && mount --bind /run/small /etc",
    )?;
    let leave = |place: &str, kib: u64| {
        let used = format!("$(df --output=used -k {place} | tail -n 1)");
        guest.ask(&format!("mount -o remount,size=$(({used} + {kib}))k {place}"))
    };
    // What the machine has is not ours to take away, but what the agent reads about it is.
    let memory = |available_mib: u64| {
        guest.ask(&format!(
            "sed -E 's/^(MemAvailable|SwapFree):.*/\\1: 0 kB/; s/^MemAvailable:.*/MemAvailable: {} kB/' \
             </proc/meminfo >/run/meminfo && mount --bind /run/meminfo /proc/meminfo",
            available_mib << 10
        ))
    };
    let before = bed.etc()?;
    checks.check("too little memory: refused, with numbers, before anything is fetched", || {
        memory(64)?;
        let answer = guest.run("node-image-pivot run")?;
        guest.ask("umount /proc/meminfo")?;
        same(answer.status, 11)?;
        contains(&answer.text, "too little memory: 64.0 MiB are needed (64.0 MiB to refresh what runs)")?;
        contains(&answer.text, "the running system is unchanged")?;
        same(guest.status()?["progress"]["bytes_fetched"].as_u64(), Some(0))?;
        guest.ask("test ! -e /run/node-image-pivot/store")?;
        bed.is_as_before(&before)
    });
    checks.check("too little memory for the image: the store leaves what the refresh takes", || {
        memory(72)?;
        let answer = guest.run("node-image-pivot run")?;
        guest.ask("umount /proc/meminfo")?;
        same(answer.status, 11)?;
        contains(&answer.text, "of 8 MiB are free")?;
        bed.is_as_before(&before)
    });
    bed.agent("pull")?;
    checks.check("/etc has no room: refused, with numbers, nothing happened", || {
        leave("/run/small", 8)?;
        let answer = guest.run("node-image-pivot run")?;
        guest.ask("mount -o remount,size=64m /run/small")?;
        same(answer.status, 10)?;
        contains(&answer.text, "on the file system of /etc, which has 8.0 KiB free")?;
        bed.is_as_before(&before)
    });
    checks.check("/run has no room: refused, with numbers, nothing happened", || {
        bed.agent("pull")?;
        leave("/run", 80)?;
        let answer = guest.run("node-image-pivot run")?;
        guest.ask("mount -o remount,size=1g /run")?;
        same(answer.status, 10)?;
        contains(&answer.text, "on the file system of /run/node-image-pivot, which has 80.0 KiB free")?;
        bed.is_as_before(&before)
    });
    checks.check("/etc fills up after the check: rolled back", || {
        bed.agent("pull")?;
        // Between the check and the acts: the record of the merge is made just before the first of them.
        bed.arm("etc-record", "sleep")?;
        let asked = guest.run(&format!(
            "node-image-pivot run >/run/asked 2>&1 & asked=$!
             while [ -e /run/failpoints/armed ]; do sleep 0.02; done
             mount -o remount,size=$(($(df --output=used -k /run/small | tail -n 1) + {}))k /run/small
             wait $asked; status=$?; mount -o remount,size=64m /run/small; cat /run/asked; exit $status",
            16
        ))?;
        same(asked.status, 1)?;
        contains(&asked.text, "No space left on device")?;
        contains(&asked.text, "rolled back: /usr and /etc are unchanged")?;
        bed.is_undone(&before)
    });
    checks.check("with room again, it is switched", || {
        bed.agent("run")?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        bed.nothing_failed()
    });
    checks.check("/etc is full when it is undone: told, and undone when there is room again", || {
        leave("/run/small", 0)?;
        let answer = guest.run("node-image-pivot undo")?;
        guest.ask("mount -o remount,size=64m /run/small")?;
        same(answer.status, 1)?;
        contains(&answer.text, "No space left on device")?;
        contains(&answer.text, "run it again")?;
        bed.agent("undo")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(guest.ask("cat /etc/base-tool/removed-default.conf")?, "goes away".into())?;
        bed.nothing_failed()
    });
    checks.finish()
}

/// Programs of /usr in a tight loop, and pairs of files: at no moment is /usr missing or mixed.
#[test]
fn usr_changes_in_one_step() -> Result<()> {
    let mut checks = Checks::new("transaction: /usr in one step");
    let bed = Bed::start("transaction-step", "node-b")?;
    let guest = &bed.guest;
    bed.agent("pull")?;
    // Builtins only in the second loop: tens of thousands of looks a second. Of three looks, the first and the
    // last at the same file, those may differ only when the switch was between them.
    let looks = r#"
        cat >/run/looks <<'END'
        exec 2>>/run/fails
        runs=0
        while [ ! -e /run/stop ]; do /usr/bin/true || echo "true: $?" >&2; runs=$((runs + 1)); done
        echo $runs >/run/runs
END
        cat >/run/pairs <<'END'
        exec 2>>/run/fails
        pairs=0 seen1=0 seen2=0
        while [ ! -e /run/stop ]; do
            read -r _ _ a </usr/lib/base-tool/data || echo "data" >&2
            { read -r _; read -r _ _ b; } </usr/bin/base-tool || echo "base-tool" >&2
            read -r _ _ c </usr/lib/base-tool/data || echo "data" >&2
            [ "$a" != "$c" ] || [ "$a" = "$b" ] || echo "mixed: $a $b $c" >&2
            [ "$c" != 1.0 ] || seen1=1
            [ "$c" != 2.0 ] || seen2=$((seen2 + 1))
            pairs=$((pairs + 1))
        done
        echo $pairs $seen1 $seen2 >/run/pairs.count
END
        rm -f /run/stop /run/fails
        systemd-run -q --unit=looks bash /run/looks; systemd-run -q --unit=pairs bash /run/pairs"#;
    guest.ask(looks)?;
    checks.check("switch and undo, three times, under the eyes of both loops", || {
        for _ in 0..3 {
            bed.agent("run")?;
            bed.agent("undo")?;
        }
        Ok(())
    });
    checks.check("nothing failed, nothing was mixed", || {
        guest.ask("touch /run/stop")?;
        wait_for("the loops' end", SOON, || Ok(guest.run("test -s /run/runs -a -s /run/pairs.count")?.status == 0))?;
        println!("       {} runs of true; pairs: {}", guest.ask("cat /run/runs")?, guest.ask("cat /run/pairs.count")?);
        same(guest.ask("cat /run/fails")?, String::new())?;
        let count = guest.ask("cat /run/pairs.count")?;
        let [pairs, seen1, seen2] = count.split(' ').map(|n| n.parse::<u64>().unwrap_or(0)).collect::<Vec<_>>()[..]
        else {
            bail!("{count}")
        };
        if pairs < 1000 || seen1 == 0 || seen2 == 0 || guest.ask("cat /run/runs")?.parse::<u64>()? < 100 {
            bail!("too few looks to mean anything: {count}");
        }
        Ok(())
    });
    checks.finish()
}

/// `run --try`: undone in time, whatever happens to the agent, unless it is kept.
#[test]
fn a_try_is_undone_unless_it_is_kept() -> Result<()> {
    let mut checks = Checks::new("transaction: run --try and keep");
    let bed = Bed::start("transaction-try", "node-b")?;
    let guest = &bed.guest;
    checks.check("nothing to keep before", || {
        let answer = guest.run("node-image-pivot keep")?;
        same(answer.status, 10)?;
        contains(&answer.text, "nothing to keep")
    });
    // Once there and back: users that sysusers makes stay.
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    checks.check("a try switches, and status, property and record say until when", || {
        bed.agent("run --try 20s")?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        contains(&bed.agent("status")?, "unless kept")?;
        let at = guest.status()?["undo_unix"].as_u64().context("no undo_unix")?;
        let now: u64 = guest.ask("date +%s")?.parse()?;
        if !(now..=now + 20).contains(&at) {
            bail!("it is {now}, undone at {at}");
        }
        let property =
            guest.ask("busctl get-property org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1 UndoAt")?;
        same(property, format!("t {at}"))
    });
    checks.check("the agent is killed, nobody keeps it: the next one undoes it in time", || {
        guest.ask(
            "systemctl kill -s KILL node-image-pivotd.service; sleep 0.5; systemctl start node-image-pivotd.service",
        )?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        wait_for("the undo", SOON, || Ok(guest.status()?["state"] == "pulled"))?;
        same(guest.status()?["undo_unix"].as_u64(), None)?;
        bed.is_as_before(&before)
    });
    checks.check("the agent is dead when the time is over, and nobody starts it: it is undone all the same", || {
        bed.agent("run --try 20s")?;
        same(timers(guest)?, "1".into())?;
        // Restart= is no here. One that died too often is not started by systemd any more.
        guest.ask(&format!(
            "mkdir -p $(dirname {LIMIT}) && printf '[Unit]\\nStartLimitIntervalSec=1h\\nStartLimitBurst=1\\n' >{LIMIT}
             systemctl daemon-reload; systemctl kill -s KILL node-image-pivotd.service; sleep 0.5
             systemctl start node-image-pivotd.service; systemctl kill -s KILL node-image-pivotd.service; sleep 0.5
             ! systemctl start node-image-pivotd.service"
        ))?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        let dead = guest.unit("node-image-pivotd.service", "ActiveState")?;
        same(dead, "failed".into())?;
        wait_for("the undo", SOON, || Ok(guest.run("base-tool")?.text.trim() == "base-tool 1.0"))?;
        wait_for("the undo's end", SOON, || Ok(bed.step()? == "staged"))?;
        wait_for("the timer's end", SOON, || Ok(timers(guest)? == "0"))?;
        bed.is_as_before(&before)
    });
    checks.check("killed in that undo, too: the timer brings it back once more", || {
        guest.ask(&format!("rm {LIMIT}; systemctl daemon-reload"))?;
        bed.agent("run --try 15s")?;
        bed.arm("etc-take-back", "kill")?;
        wait_for("the death of the agent", SOON, || bed.acted())?;
        wait_for("the undo", 2 * SOON, || Ok(bed.step()? == "staged"))?;
        wait_for("the timer's end", SOON, || Ok(timers(guest)? == "0"))?;
        bed.is_as_before(&before)
    });
    for point in ["write node-image-pivot-try.service", "systemd StartUnit"] {
        checks.check(&format!("no timer, no try: {point}"), || {
            bed.arm(point, "enospc")?;
            let answer = guest.run("node-image-pivot run --try 10m")?;
            same(bed.acted()?, true)?;
            same(answer.status, 1)?;
            contains(&answer.text, "cannot see to it that the switch is undone in time")?;
            contains(&answer.text, "the running system is unchanged")?;
            same(timers(guest)?, "0".into())?;
            bed.is_as_before(&before)
        });
    }
    checks.check("kept, twice: it stays, also after a restart of the agent", || {
        bed.agent("run --try 10s")?;
        contains(&bed.agent("keep")?, "the switch stays")?;
        contains(&bed.agent("keep")?, "kept already")?;
        same(timers(guest)?, "0".into())?;
        guest.ask("systemctl restart node-image-pivotd.service; sleep 11")?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        same(guest.status()?["undo_unix"].as_u64(), None)
    });
    checks.check("no try of what is switched for good; undo all the same; then nothing to keep", || {
        let answer = guest.run("node-image-pivot run --try 10m")?;
        same(answer.status, 10)?;
        contains(&answer.text, "switched already")?;
        bed.agent("undo")?;
        bed.is_as_before(&before)?;
        same(guest.run("node-image-pivot keep")?.status, 10)
    });
    checks.check("a length of time that is none is wrong usage", || {
        same(guest.run("node-image-pivot run --try soon")?.status, 2)
    });
    checks.finish()
}

/// How many timers wait for the end of a probation, files and units.
fn timers(guest: &dyn Guest) -> Result<String> {
    let loaded = guest.ask("systemctl list-timers --all --no-legend 'node-image-pivot-try-*' | wc -l")?;
    same(guest.ask("ls /run/systemd/system | grep -c 'node-image-pivot-try-.*timer' || true")?, loaded.clone())?;
    Ok(loaded)
}

/// What somebody changed after the switch stays and is named; all that fails is named; undo twice answers alike.
#[test]
fn undo_tells_all_it_could_not_do() -> Result<()> {
    let mut checks = Checks::new("transaction: undo");
    let bed = Bed::start("transaction-undo", "node-b")?;
    let guest = &bed.guest;
    bed.agent("run")?;
    checks.check("files that were changed since are kept, each by name", || {
        guest.ask("echo mine >/etc/base-tool/new-default.conf; echo mine >>/etc/base-tool/changed-default.conf")?;
        let said = bed.agent("undo")?;
        contains(&said, "/etc/base-tool/new-default.conf stays: changed since the switch")?;
        contains(&said, "/etc/base-tool/changed-default.conf stays: changed since the switch")?;
        same(guest.ask("cat /etc/base-tool/new-default.conf")?, "mine".into())?;
        same(guest.ask("cat /etc/base-tool/removed-default.conf")?, "goes away".into())
    });
    checks.check("whoever asks again is told again", || {
        contains(&bed.agent("undo")?, "/etc/base-tool/new-default.conf stays")
    });
    checks.check("undo names what it cannot do, and goes on later", || {
        guest.ask("rm /etc/base-tool/new-default.conf; echo 'default of 1.0' >/etc/base-tool/changed-default.conf")?;
        bed.agent("run")?;
        bed.arm("etc-take-back", "eio")?;
        let answer = guest.run("node-image-pivot undo")?;
        same(answer.status, 1)?;
        contains(&answer.text, "Input/output error")?;
        contains(&answer.text, "run it again")?;
        bed.agent("undo")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        bed.nothing_failed()
    });
    checks.finish()
}

/// One agent at a time; the second says who the first is.
#[test]
fn a_second_agent_says_who_holds_the_lock() -> Result<()> {
    let mut checks = Checks::new("transaction: the lock");
    let bed = Bed::start("transaction-lock", "node-b")?;
    let guest = &bed.guest;
    bed.agent("plan")?;
    checks.check("a second daemon ends, and names the first", || {
        let pid = guest.unit("node-image-pivotd.service", "MainPID")?;
        let answer = guest.run("node-image-pivot daemon")?;
        same(answer.status, 1)?;
        contains(&answer.text, "another agent runs")?;
        contains(&answer.text, &format!("pid {pid}"))?;
        same(guest.unit("node-image-pivotd.service", "MainPID")?, pid)
    });
    checks.check("two callers at once: both succeed, one switch; nothing is isolated, reload or not", || {
        // The image is configured by now, but this boot is over: the generator leaves it alone at a reload.
        guest.ask(
            "systemctl daemon-reload; systemctl restart node-image-pivotd.service
             ! systemctl show -p Environment node-image-pivotd.service | grep NODE_IMAGE_PIVOT_TARGET || exit 1
             systemctl get-default | grep -qx multi-user.target || exit 1
             systemd-run -q --unit=installer sleep infinity
             node-image-pivot run & first=$!; node-image-pivot run && wait $first",
        )?;
        same(guest.ask("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?, "1".into())?;
        same(guest.unit("installer.service", "ActiveState")?, "active".into())?;
        same(bed.step()?, "refreshed".into())
    });
    checks.finish()
}

/// What a killed agent can leave behind: a PID 1 of another /usr than the one in place, and a start limit that is used up.
#[test]
fn a_refused_daemon_is_started_by_the_systemd_in_place() -> Result<()> {
    let mut checks = Checks::new("transaction: the start limit over a re-exec");
    let bed = Bed::start("transaction-refused", "node-a")?;
    let guest = &bed.guest;
    bed.agent("run")?;
    guest.ask(&format!(
        "mkdir -p $(dirname {LIMIT}) && printf '[Unit]\\nStartLimitIntervalSec=1h\\nStartLimitBurst=1\\n' >{LIMIT}
         kill_it() {{
             systemctl kill -s KILL node-image-pivotd.service
             until [ \"$(systemctl show -p MainPID --value node-image-pivotd.service)\" = 0 ]; do sleep 0.02; done
         }}
         systemctl daemon-reload; kill_it
         systemctl start node-image-pivotd.service; kill_it
         ! systemctl start node-image-pivotd.service"
    ))?;
    checks.check("a re-exec alone does not forget it", || {
        guest.ask("systemctl daemon-reexec; ! systemctl start node-image-pivotd.service").map(drop)
    });
    checks.check("as long as PID 1 is what is in place, refused is refused", || {
        let answer = guest.run("node-image-pivot plan")?;
        same(answer.status, 1)?;
        contains(&answer.text, "the daemon cannot be started")
    });
    checks.check("by the systemd in place it is started", || {
        guest.ask(
            "cp -a /usr/lib/systemd/systemd /run/systemd-copy
             mount --bind /run/systemd-copy /usr/lib/systemd/systemd",
        )?;
        bed.agent("plan")?;
        same(guest.unit("node-image-pivotd.service", "ActiveState")?, "active".into())
    });
    checks.finish()
}
