//! Checks before the first act of a switch and of an undo, and the remains of a switch whose record is lost.

use anyhow::{Context as _, Result, bail};
use testbed::check::{contains, same, same_text};
use testbed::guest::Guest;
use testbed::proc::wait_for;
use testbed::scenarios;
use testbed::suite::Suite;

use super::SOON;
use super::bed::Bed;

/// Covers /usr as systemd-sysext does with an extension.
const COVER: &str = "mkdir -p /run/empty && mount -t overlay -o ro,lowerdir=/run/empty:/usr sysext /usr";

/// A container, and its /etc before and after a switch.
struct Switched {
    bed: Bed,
    before: String,
    after: String,
}

impl Switched {
    /// Checks that the system is switched and that no undo has begun.
    fn is_unchanged(&self) -> Result<()> {
        same(self.bed.step()?, "refreshed".into())?;
        same(self.bed.guest.ask("base-tool")?, "base-tool 2.0".into())?;
        same_text(&self.bed.etc()?, &self.after)
    }
}

/// Returns the last lines of the agent's journal.
fn journal(bed: &Bed) -> String {
    bed.guest.ask("journalctl -u node-image-pivotd.service -n 40 --no-pager").unwrap_or_default()
}

/// Mounts over or below the node image's /usr are in the way of an undo.
#[test]
fn an_undo_begins_only_if_it_can_complete() -> Result<()> {
    let mut suite = Suite::new("transaction: checks before an undo");
    let bed = Bed::start("transaction-back", "node-b")?;
    // Switch and undo once, because users that sysusers makes stay.
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    bed.agent("run")?;
    let after = bed.etc()?;
    suite.run(
        &mut Switched { bed, before, after },
        &scenarios![
            an_undo_is_refused_under_a_mount_over_usr_and_status_reports_the_mount,
            an_undo_is_refused_with_a_mount_below_usr,
            another_configured_image_refuses_a_run_and_status_reports_it,
            an_undo_without_obstacles_completes,
            a_trial_period_that_ends_under_a_mount_is_reported_once_and_undone_later
                after an_undo_without_obstacles_completes,
        ],
    );
    suite.finish()
}

fn an_undo_is_refused_under_a_mount_over_usr_and_status_reports_the_mount(switched: &mut Switched) -> Result<()> {
    let guest = &switched.bed.guest;
    guest.ask(COVER)?;
    let answer = guest.run("node-image-pivot undo")?;
    same(answer.status, 10)?;
    contains(&answer.text, "sysext (overlay) is mounted over /usr")?;
    contains(&switched.bed.agent("status")?, "sysext (overlay) is mounted over the node image's /usr")?;
    switched.is_unchanged()?;
    guest.ask("umount -l /usr").map(drop)
}

fn an_undo_is_refused_with_a_mount_below_usr(switched: &mut Switched) -> Result<()> {
    let guest = &switched.bed.guest;
    guest.ask("mkdir -p /run/mine && mount --bind /run/mine /usr/share/misc")?;
    let answer = guest.run("node-image-pivot undo")?;
    same(answer.status, 10)?;
    contains(&answer.text, "/usr/share/misc is mounted below /usr")?;
    switched.is_unchanged()?;
    guest.ask("umount /usr/share/misc").map(drop)
}

fn another_configured_image_refuses_a_run_and_status_reports_it(switched: &mut Switched) -> Result<()> {
    let guest = &switched.bed.guest;
    guest.ask("cp -a /etc/node-image-pivot.conf.d /run/conf; sed -i 's#^image = .*#image = \"other.example/x:1\"#' /etc/node-image-pivot.conf.d/*.toml")?;
    let answer = guest.run("node-image-pivot run")?;
    let status = switched.bed.agent("status")?;
    guest.ask("cp -a /run/conf/. /etc/node-image-pivot.conf.d/")?;
    same(answer.status, 10)?;
    contains(&answer.text, "run undo, then run again")?;
    contains(&status, "/usr and /etc are the node image's")?;
    contains(&status, "asks for other.example/x:1")
}

fn an_undo_without_obstacles_completes(switched: &mut Switched) -> Result<()> {
    switched.bed.agent("undo")?;
    switched.bed.is_undone(&switched.before)
}

fn a_trial_period_that_ends_under_a_mount_is_reported_once_and_undone_later(switched: &mut Switched) -> Result<()> {
    let (bed, guest) = (&switched.bed, &switched.bed.guest);
    bed.agent("run --try 10m")?;
    guest.ask(COVER)?;
    bed.end_trial_period()?;
    wait_for("the report", SOON, || Ok(guest.status()?["error"]["message"].to_string().contains("sysext")))?;
    switched.is_unchanged()?;
    guest.ask("umount -l /usr")?;
    // The next attempt is made half a minute after the first.
    wait_for("the undo", 2 * SOON, || Ok(bed.step()? == "staged"))?;
    let reports =
        "journalctl -u node-image-pivotd.service -o cat | grep -c 'cannot undo the switch whose trial period is over'";
    same(guest.ask(reports)?, "1".into())?;
    bed.is_undone(&switched.before)
}

/// A container whose agent loses the record of a switch, and its /etc before the switch.
struct Lost {
    bed: Bed,
    before: String,
}

#[test]
fn a_lost_record_allows_an_undo() -> Result<()> {
    let mut suite = Suite::new("transaction: a lost record");
    let bed = Bed::start("transaction-lost", "node-b")?;
    bed.agent("run")?;
    bed.agent("undo")?;
    let before = bed.etc()?;
    let mut lost = Lost { bed, before };
    let rows = [
        ("removed", "rm state.json"),
        ("truncated", "truncate -s 200 state.json"),
        ("of another shape", "echo '{\"schema\": 2}' >state.json"),
        ("of another schema", "jq 'del(.checksum) | .schema = 7' state.json >x && mv x state.json"),
    ];
    suite.each("all_commands_report_the_switch_and_undo_works_when_the_record_is", None, &mut lost, rows, undone);
    suite.run(&mut lost, &scenarios![a_damaged_record_without_a_switch_is_reported_and_set_aside]);
    suite.finish()
}

fn undone(lost: &mut Lost, damage: &&str) -> Result<()> {
    let (bed, guest) = (&lost.bed, &lost.bed.guest);
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
    bed.is_undone(&lost.before)
}

fn a_damaged_record_without_a_switch_is_reported_and_set_aside(lost: &mut Lost) -> Result<()> {
    let (bed, guest) = (&lost.bed, &lost.bed.guest);
    guest.ask("systemctl stop node-image-pivotd.service; echo x >/run/node-image-pivot/state.json")?;
    contains(&bed.agent("status")?, "nothing is switched")?;
    bed.agent("run")?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    guest.ask("test -s /run/node-image-pivot/state.json.damaged").map(drop)
}

/// Days may lie between pull and overlay, and an administrator may stop the daemon between two acts.
#[test]
fn a_switch_begins_only_on_the_machine_that_was_staged() -> Result<()> {
    let mut suite = Suite::new("transaction: checks before a switch");
    let mut bed = Bed::start("transaction-again", "node-b")?;
    bed.agent("pull")?;
    let rows = [
        (
            "a /usr that was made writable",
            (
                "mkdir -p /run/u /run/w && mount -t overlay -o lowerdir=/usr,upperdir=/run/u,workdir=/run/w unlocked /usr",
                "unlocked",
            ),
        ),
        (
            "a mount over the modules",
            ("mkdir -p /usr/lib/modules && mount -t tmpfs mods /usr/lib/modules", "/usr/lib/modules is a mount point"),
        ),
    ];
    suite.each("an_overlay_is_refused_after", None, &mut bed, rows, |bed, (mount, named)| refused(bed, mount, named));
    suite.run(
        &mut bed,
        &scenarios![
            an_overlay_is_refused_after_a_new_conflict_under_strategy_fail,
            a_daemon_that_is_stopped_during_a_switch_completes_it,
            a_daemon_that_is_stopped_during_an_undo_completes_it
                after a_daemon_that_is_stopped_during_a_switch_completes_it,
        ],
    );
    suite.finish()
}

fn refused(bed: &Bed, mount: &str, named: &str) -> Result<()> {
    let guest = &bed.guest;
    guest.ask(mount)?;
    let answer = guest.run("node-image-pivot overlay");
    guest.ask("umount /usr/lib/modules 2>/dev/null || umount -l /usr")?;
    let answer = answer?;
    same(answer.status, 10)?;
    contains(&answer.text, named)?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    bed.agent("pull").map(drop)
}

fn an_overlay_is_refused_after_a_new_conflict_under_strategy_fail(bed: &mut Bed) -> Result<()> {
    let (guest, conf) = (&bed.guest, "/etc/node-image-pivot.conf.d/61-fail.toml");
    guest.ask(&format!("printf '[etc]\\nstrategy = \"fail\"\\n' >{conf}; cp -a /etc/base-tool /run/tool"))?;
    guest.ask("for f in admin-edited admin-removed; do cp -a /usr/etc/base-tool/$f.conf /etc/base-tool/; done")?;
    bed.agent("pull")?;
    guest.ask("echo mine >/etc/base-tool/changed-default.conf")?;
    let answer = guest.run("node-image-pivot overlay")?;
    same(answer.status, 10)?;
    contains(&answer.text, "/etc/base-tool/changed-default.conf")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    guest.ask(&format!("rm {conf}")).map(drop)
}

/// Asks for `command`, and stops the daemon as soon as it is at the failpoint.
fn stop_daemon_at(bed: &Bed, point: &str, command: &str) -> Result<()> {
    bed.arm(point, "sleep")?;
    bed.guest.ask(&format!(
        "node-image-pivot {command} >/run/asked 2>&1 & asked=$!
         while [ -e /run/failpoints/armed ] && kill -0 $asked; do sleep 0.02; done
         systemctl stop node-image-pivotd.service; kill -9 $asked; wait $asked; true"
    ))?;
    // A re-execution of PID 1 disconnects systemctl before the job ends.
    bed.guest.wait_unit("node-image-pivotd.service", "inactive", SOON)
}

fn a_daemon_that_is_stopped_during_a_switch_completes_it(bed: &mut Bed) -> Result<()> {
    bed.agent("pull")?;
    stop_daemon_at(bed, "etc-record", "overlay")?;
    same(bed.step()?, "refreshed".into()).with_context(|| journal(bed))?;
    same(bed.guest.ask("base-tool")?, "base-tool 2.0".into())?;
    same(bed.guest.unit("node-image-pivotd.service", "Result")?, "success".into())?;
    bed.nothing_failed()
}

fn a_daemon_that_is_stopped_during_an_undo_completes_it(bed: &mut Bed) -> Result<()> {
    stop_daemon_at(bed, "etc-revert", "undo")?;
    same(bed.step()?, "staged".into()).with_context(|| journal(bed))?;
    same(bed.guest.ask("base-tool")?, "base-tool 1.0".into())?;
    bed.nothing_failed()
}
