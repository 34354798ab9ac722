//! Answers that a support engineer and a program get from a machine whose pivot was cancelled.

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::check::{contains, contains_any, same};
use testbed::container::Bed;
use testbed::guest::Guest;

use super::{SOON, state, wait_state};

const CALL: &str =
    "busctl --timeout=infinity call org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1 Pull";
const BEGIN: &str = "MESSAGE_ID=5b2c6d0e9d4f4f7c8a3b1f6e2d7c9a10";
const END: &str = "MESSAGE_ID=c1f0a8e47b3d4a52b6e9d3705f8a2b11";

pub fn a_bus_caller_that_leaves_takes_its_pull_with_it(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask(&format!("systemd-run --unit=caller {CALL}"))?;
    wait_state(guest, "waiting")?;
    same(guest.run("node-image-pivot status --exit-code")?.status, 14)?;
    guest.ask("systemctl stop caller.service")?;
    wait_state(guest, "failed")?;
    contains(&guest.ask("node-image-pivot status")?, "cancelled")
}

pub fn status_exits_like_the_call_that_failed(bed: &mut Bed) -> Result<()> {
    let answer = bed.guest.run("node-image-pivot status --exit-code")?;
    same(answer.status, 12)?;
    contains(&answer.text, "agent: running")?;
    contains(&answer.text, "node-image-pivot explain cancelled")?;
    contains(&bed.guest.ask("node-image-pivot explain cancelled")?, "docs/troubleshooting.md#classes-of-failures")
}

pub fn answers_are_documents(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let answer: Value = serde_json::from_str(&guest.ask("node-image-pivot cancel --json")?)?;
    same(answer.to_string(), r#"{"lines":[],"schema":1,"state":"failed"}"#.into())?;
    for command in ["undo", "keep"] {
        same(guest.ask(&format!("node-image-pivot {command} --json 2>/dev/null; echo $?"))?, "10".into())?;
    }
    same(state(guest)?, "failed".into())
}

pub fn the_units_journal_has_a_begin_and_an_end_that_the_catalog_explains(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("journalctl --update-catalog")?;
    let begin = record_of_the_pull(guest, BEGIN)?;
    for part in [
        "node-image-pivot ",
        "Linux ",
        "systemd ",
        "skopeo ",
        "flow ",
        "image = ",
        "50-testbed.toml",
        "man:node-image-pivot(1)",
    ] {
        contains_any(&begin, &[part]).with_context(|| format!("the begin lacks {part}"))?;
    }
    let end = end_of_the_pull(guest)?;
    contains(&end, "node-image-pull.service has failed")?;
    contains(&end, "A phase of the node image pivot has ended")
}

pub fn end_of_the_pull(guest: &dyn Guest) -> Result<String> {
    record_of_the_pull(guest, END)
}

fn record_of_the_pull(guest: &dyn Guest, id: &str) -> Result<String> {
    guest.ask(&format!("journalctl -b -x -u node-image-pull.service {id}"))
}

pub fn gather_writes_one_archive_for_root(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let file = guest.ask("node-image-pivot gather")?;
    same(guest.ask(&format!("stat -c '%a %U' {file}"))?, "600 root".into())?;
    let names = guest.ask(&format!("tar -tzf {file}"))?;
    for name in ["status.txt", "report.json", "report.svg", "record/state.json", "configuration.txt", "versions.txt"] {
        contains(&names, &format!("node-image-pivot/{name}"))?;
    }
    let text = |name: &str| guest.ask(&format!("tar -xzOf {file} node-image-pivot/{name}"));
    contains(&text("journal/node-image-pull.service.txt")?, "node-image-pull.service begins: node-image-pivot ")?;
    contains(&text("status.txt")?, "cancelled")?;
    guest.ask("systemctl stop node-image-pivotd.service")?;
    contains(&guest.ask("node-image-pivot gather --output - | tar -xzO node-image-pivot/status.txt")?, "cancelled")?;
    contains(&guest.ask("node-image-pivot status")?, "agent: not running")?;
    guest.ask("systemctl start node-image-pivotd.service")?;
    guest.wait_unit("node-image-pivotd.service", "active", SOON)
}
