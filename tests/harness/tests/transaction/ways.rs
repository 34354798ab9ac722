//! What is checked before the first act, there and back, and what is left of a switch whose record is lost.

use anyhow::{Context as _, Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::proc::wait_for;

use super::SOON;
use super::bed::Bed;

/// As systemd-sysext merges an extension.
const COVER: &str = "mkdir -p /run/empty && mount -t overlay -o ro,lowerdir=/run/empty:/usr sysext /usr";

/// The state of a switched system that no undo has touched.
fn is_still_switched(bed: &Bed, etc: &str) -> Result<()> {
    same(bed.step()?, "refreshed".into())?;
    same(bed.guest.ask("base-tool")?, "base-tool 2.0".into())?;
    super::bed::same_text(&bed.etc()?, etc)
}

/// The agent's last words.
fn journal(bed: &Bed) -> String {
    bed.guest.ask("journalctl -u node-image-pivotd.service -n 40 --no-pager").unwrap_or_default()
}

/// Anything mounted over the node image's /usr, or below it.
#[test]
fn an_undo_begins_only_where_it_can_end() -> Result<()> {
    let mut checks = Checks::new("transaction: the way back is checked");
    let bed = Bed::start("transaction-back", "node-b")?;
    let guest = &bed.guest;
    // Once there and back: users that sysusers makes stay.
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    bed.agent("run")?;
    let after = bed.etc()?;
    checks.check("covered: refused with the mount's name, nothing undone, and status reports the mount", || {
        guest.ask(COVER)?;
        let answer = guest.run("node-image-pivot undo")?;
        same(answer.status, 10)?;
        contains(&answer.text, "sysext (overlay) is mounted over /usr")?;
        contains(&bed.agent("status")?, "sysext (overlay) is mounted over the node image's /usr")?;
        is_still_switched(&bed, &after)?;
        guest.ask("umount -l /usr").map(drop)
    });
    checks.check("a mount below: refused with its name", || {
        guest.ask("mkdir -p /run/mine && mount --bind /run/mine /usr/share/misc")?;
        let answer = guest.run("node-image-pivot undo")?;
        same(answer.status, 10)?;
        contains(&answer.text, "/usr/share/misc is mounted below /usr")?;
        is_still_switched(&bed, &after)?;
        guest.ask("umount /usr/share/misc").map(drop)
    });
    checks.check("another image is configured: refused with the way out, and status reports it", || {
        guest.ask("cp -a /etc/node-image-pivot.conf.d /run/conf; sed -i 's#^image = .*#image = \"other.example/x:1\"#' /etc/node-image-pivot.conf.d/*.toml")?;
        let answer = guest.run("node-image-pivot run")?;
        let status = bed.agent("status")?;
        guest.ask("cp -a /run/conf/. /etc/node-image-pivot.conf.d/")?;
        same(answer.status, 10)?;
        contains(&answer.text, "run undo, then run again")?;
        contains(&status, "/usr and /etc are the node image's")?;
        contains(&status, "asks for other.example/x:1")
    });
    checks.check("with nothing in its way, it is undone", || {
        bed.agent("undo")?;
        bed.is_undone(&before)
    });
    checks.check("a trial period that ends under a mount: reported once, undone when the mount is gone", || {
        bed.agent("run --try 10s")?;
        guest.ask(COVER)?;
        wait_for("the report", SOON, || Ok(guest.status()?["error"]["message"].to_string().contains("sysext")))?;
        guest.ask("sleep 32")?;
        is_still_switched(&bed, &after)?;
        let reports = "journalctl -u node-image-pivotd.service -o cat | grep -c 'cannot undo the switch whose trial period is over'";
        same(guest.ask(reports)?, "1".into())?;
        guest.ask("umount -l /usr")?;
        wait_for("the undo", 2 * SOON, || Ok(bed.step()? == "staged"))?;
        bed.is_undone(&before)
    });
    checks.finish()
}

/// The record of a switch is gone, or is not what was written.
#[test]
fn a_lost_record_allows_an_undo() -> Result<()> {
    let mut checks = Checks::new("transaction: a lost record");
    let bed = Bed::start("transaction-lost", "node-b")?;
    let guest = &bed.guest;
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    for (what, damage) in [
        ("gone", "rm state.json"),
        ("cut", "truncate -s 200 state.json"),
        ("another shape", "echo '{\"schema\": 1}' >state.json"),
        ("foreign", "jq 'del(.checksum) | .schema = 7' state.json >x && mv x state.json"),
    ] {
        checks.check(&format!("{what}: status, report and run say what is left, and undo undoes"), || {
            bed.agent("run")?;
            guest.ask(&format!("systemctl stop node-image-pivotd.service; cd /run/node-image-pivot && {damage}"))?;
            for command in ["status", "report"] {
                let text = bed.agent(command)?;
                contains(&text, "/usr is the node image's")?;
                contains(&text, "run undo")?;
            }
            let answer = guest.run("node-image-pivot run")?;
            same(answer.status, 10)?;
            contains(&answer.text, "cannot use the record of the switch")?;
            if answer.text.contains("untouched") {
                bail!("{}", answer.text);
            }
            same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
            bed.agent("undo")?;
            bed.is_undone(&before)
        });
    }
    checks.check("damaged with nothing switched: status says so, and the agent begins without it", || {
        guest.ask("systemctl stop node-image-pivotd.service; echo x >/run/node-image-pivot/state.json")?;
        contains(&bed.agent("status")?, "nothing is switched")?;
        bed.agent("run")?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        guest.ask("test -s /run/node-image-pivot/state.json.damaged").map(drop)
    });
    checks.finish()
}

/// Days may lie between pull and overlay; and the daemon may be stopped in between the acts.
#[test]
fn a_switch_begins_only_on_the_machine_that_was_staged() -> Result<()> {
    let mut checks = Checks::new("transaction: the switch checks again");
    let bed = Bed::start("transaction-again", "node-b")?;
    let guest = &bed.guest;
    bed.agent("pull")?;
    for (what, mount, named) in [
        (
            "/usr was made writable",
            "mkdir -p /run/u /run/w && mount -t overlay -o lowerdir=/usr,upperdir=/run/u,workdir=/run/w unlocked /usr",
            "unlocked",
        ),
        (
            "the modules were mounted over",
            "mkdir -p /usr/lib/modules && mount -t tmpfs mods /usr/lib/modules",
            "/usr/lib/modules is a mount point",
        ),
    ] {
        checks.check(&format!("{what}: refused"), || {
            guest.ask(mount)?;
            let answer = guest.run("node-image-pivot overlay");
            guest.ask("umount /usr/lib/modules 2>/dev/null || umount -l /usr")?;
            let answer = answer?;
            same(answer.status, 10)?;
            contains(&answer.text, named)?;
            same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
            bed.agent("pull").map(drop)
        });
    }
    let conf = "/etc/node-image-pivot.conf.d/61-fail.toml";
    checks.check("a conflict came up under strategy \"fail\": refused", || {
        guest.ask(&format!("printf '[etc]\\nstrategy = \"fail\"\\n' >{conf}; cp -a /etc/base-tool /run/tool"))?;
        guest.ask("for f in admin-edited admin-removed; do cp -a /usr/etc/base-tool/$f.conf /etc/base-tool/; done")?;
        bed.agent("pull")?;
        guest.ask("echo mine >/etc/base-tool/changed-default.conf")?;
        let answer = guest.run("node-image-pivot overlay")?;
        same(answer.status, 10)?;
        contains(&answer.text, "/etc/base-tool/changed-default.conf")?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        guest.ask(&format!("rm {conf}")).map(drop)
    });
    checks.check("the daemon is stopped in the middle of the switch: it finishes first", || {
        bed.agent("pull")?;
        bed.arm("etc-record", "sleep")?;
        guest.ask(
            "node-image-pivot overlay >/run/asked 2>&1 & asked=$!
             while [ -e /run/failpoints/armed ] && kill -0 $asked; do sleep 0.02; done
             systemctl stop node-image-pivotd.service; kill -9 $asked; wait $asked; true",
        )?;
        // A re-execution of PID 1 disconnects systemctl before the job ends.
        guest.wait_unit("node-image-pivotd.service", "inactive", SOON)?;
        same(bed.step()?, "refreshed".into()).with_context(|| journal(&bed))?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        same(guest.ask("systemctl show -p Result --value node-image-pivotd.service")?, "success".into())?;
        bed.nothing_failed()
    });
    checks.check("and in the middle of an undo", || {
        bed.arm("etc-take-back", "sleep")?;
        guest.ask(
            "node-image-pivot undo >/run/asked 2>&1 & asked=$!
             while [ -e /run/failpoints/armed ] && kill -0 $asked; do sleep 0.02; done
             systemctl stop node-image-pivotd.service; kill -9 $asked; wait $asked; true",
        )?;
        guest.wait_unit("node-image-pivotd.service", "inactive", SOON)?;
        same(bed.step()?, "staged".into()).with_context(|| journal(&bed))?;
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        bed.nothing_failed()
    });
    checks.finish()
}
