//! The switch is a transaction: killed or failing at every act, it is completed or undone, never left half done. On a
//! real systemd in a container, with an agent that has failpoints (crates/support/src/failpoint.rs).
//! `make check-one NAME=transaction`

mod acts;
mod bed;
mod bound;
mod room;
mod step;
mod trial;
mod undo;
mod ways;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::check::{contains, same};
use testbed::guest::Guest;
use testbed::images::{project, work_dir};
use testbed::proc::succeed;
use testbed::scenario::unit_is;
use testbed::scenarios;
use testbed::suite::Suite;

use bed::{Bed, agent_with_failpoints};

const SOON: Duration = Duration::from_secs(120);
/// Drop-in in which a test limits the starts of the agent.
const LIMIT: &str = "/run/systemd/system/node-image-pivotd.service.d/limit.conf";
/// Shell function that kills the agent and waits until systemd has noticed.
const KILL_IT: &str = "kill_it() {
         systemctl kill -s KILL node-image-pivotd.service
         until [ \"$(systemctl show -p MainPID --value node-image-pivotd.service)\" = 0 ]; do sleep 0.02; done
     }";

#[test]
fn the_installed_agent_has_no_failpoints() -> Result<()> {
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

/// One agent runs at a time; the second reports which one is the first.
#[test]
fn a_second_agent_reports_the_holder_of_the_lock() -> Result<()> {
    let mut suite = Suite::new("transaction: the lock");
    let mut bed = Bed::start("transaction-lock", "node-b")?;
    bed.agent("plan")?;
    suite.run(&mut bed, &scenarios![a_second_daemon_ends_and_names_the_first, two_callers_at_once_make_one_switch]);
    suite.finish()
}

fn a_second_daemon_ends_and_names_the_first(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let pid = guest.unit("node-image-pivotd.service", "MainPID")?;
    let answer = guest.run("node-image-pivot daemon")?;
    same(answer.status, 1)?;
    contains(&answer.text, "another agent runs")?;
    contains(&answer.text, &format!("pid {pid}"))?;
    same(guest.unit("node-image-pivotd.service", "MainPID")?, pid)
}

/// The image is configured by now, but the boot is over: a reload does not make the generator redirect it, and no isolate
/// ends the other services.
fn two_callers_at_once_make_one_switch(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask(
        "systemctl daemon-reload; systemctl restart node-image-pivotd.service
         ! systemctl show -p Environment node-image-pivotd.service | grep NODE_IMAGE_PIVOT_TARGET || exit 1
         systemctl get-default | grep -qx multi-user.target || exit 1
         systemd-run -q --unit=installer sleep infinity
         node-image-pivot run & first=$!; node-image-pivot run && wait $first",
    )?;
    same(guest.ask("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?, "1".into())?;
    unit_is(guest, "installer.service", "active")?;
    same(bed.step()?, "refreshed".into())
}

/// A killed agent can leave a PID 1 of another /usr than the one in place, and a start limit that is used up.
#[test]
fn a_daemon_over_its_start_limit_is_started_by_the_systemd_in_place() -> Result<()> {
    let mut suite = Suite::new("transaction: the start limit over a re-exec");
    let mut bed = Bed::start("transaction-refused", "node-a")?;
    bed.agent("run")?;
    bed.guest.ask(&format!(
        "mkdir -p $(dirname {LIMIT}) && printf '[Unit]\\nStartLimitIntervalSec=1h\\nStartLimitBurst=1\\n' >{LIMIT}
         {KILL_IT}
         systemctl daemon-reload; kill_it
         systemctl start node-image-pivotd.service; kill_it
         ! systemctl start node-image-pivotd.service"
    ))?;
    suite.run(
        &mut bed,
        &scenarios![
            a_re_exec_alone_keeps_the_start_limit,
            a_start_stays_refused_while_pid_1_is_the_systemd_in_place,
            the_systemd_in_place_starts_the_daemon,
        ],
    );
    suite.finish()
}

fn a_re_exec_alone_keeps_the_start_limit(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("systemctl daemon-reexec; ! systemctl start node-image-pivotd.service").map(drop)
}

fn a_start_stays_refused_while_pid_1_is_the_systemd_in_place(bed: &mut Bed) -> Result<()> {
    let answer = bed.guest.run("node-image-pivot plan")?;
    same(answer.status, 1)?;
    contains(&answer.text, "cannot start the daemon")
}

fn the_systemd_in_place_starts_the_daemon(bed: &mut Bed) -> Result<()> {
    bed.guest.ask(
        "cp -a /usr/lib/systemd/systemd /run/systemd-copy
         mount --bind /run/systemd-copy /usr/lib/systemd/systemd",
    )?;
    bed.agent("plan")?;
    unit_is(&bed.guest, "node-image-pivotd.service", "active")
}
