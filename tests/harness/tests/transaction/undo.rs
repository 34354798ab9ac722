//! An undo keeps and names files that were changed since the switch, and names what it cannot do.

use anyhow::Result;
use testbed::check::{contains, same};
use testbed::guest::Guest;
use testbed::scenarios;
use testbed::suite::Suite;

use super::bed::Bed;

#[test]
fn undo_reports_all_that_it_does_not_restore() -> Result<()> {
    let mut suite = Suite::new("transaction: undo");
    let mut bed = Bed::start("transaction-undo", "node-b")?;
    bed.agent("run")?;
    suite.run(
        &mut bed,
        &scenarios![
            files_that_were_changed_since_the_switch_are_kept_and_named,
            a_second_undo_names_the_kept_files_again
                after files_that_were_changed_since_the_switch_are_kept_and_named,
            an_undo_names_what_it_cannot_do_and_goes_on_later,
        ],
    );
    suite.finish()
}

fn files_that_were_changed_since_the_switch_are_kept_and_named(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("echo mine >/etc/base-tool/new-default.conf; echo mine >>/etc/base-tool/changed-default.conf")?;
    let said = bed.agent("undo")?;
    contains(&said, "/etc/base-tool/new-default.conf stays: changed since the switch")?;
    contains(&said, "/etc/base-tool/changed-default.conf stays: changed since the switch")?;
    same(guest.ask("cat /etc/base-tool/new-default.conf")?, "mine".into())?;
    same(guest.ask("cat /etc/base-tool/removed-default.conf")?, "goes away".into())
}

fn a_second_undo_names_the_kept_files_again(bed: &mut Bed) -> Result<()> {
    contains(&bed.agent("undo")?, "/etc/base-tool/new-default.conf stays")
}

fn an_undo_names_what_it_cannot_do_and_goes_on_later(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("rm /etc/base-tool/new-default.conf; echo 'default of 1.0' >/etc/base-tool/changed-default.conf")?;
    bed.agent("run")?;
    bed.arm("etc-revert", "eio")?;
    let answer = guest.run("node-image-pivot undo")?;
    same(answer.status, 1)?;
    contains(&answer.text, "Input/output error")?;
    contains(&answer.text, "run undo, again if it fails")?;
    bed.agent("undo")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    bed.nothing_failed()
}
