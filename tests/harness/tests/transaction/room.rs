//! Full file systems and too little memory: refused with numbers before the first act, or rolled back.

use anyhow::Result;
use testbed::check::{contains, same};
use testbed::guest::{Answer, Guest};
use testbed::scenarios;
use testbed::suite::Suite;

use super::bed::Bed;

/// A container whose /etc is a file system of 64 MiB, and /etc before the first switch.
struct Small {
    bed: Bed,
    before: String,
}

impl Small {
    fn new() -> Result<Self> {
        let bed = Bed::start("transaction-room", "node-b")?;
        bed.guest.ask(
            "mkdir /run/small && mount -t tmpfs -o size=64m,mode=0755 small /run/small && cp -a /etc/. /run/small/ \
             && mount --bind /run/small /etc",
        )?;
        let before = bed.etc()?;
        Ok(Small { bed, before })
    }

    /// Shrinks a tmpfs so that it has `kib` of room.
    fn leave(&self, place: &str, kib: u64) -> Result<String> {
        let used = format!("$(df --output=used -k {place} | tail -n 1)");
        self.bed.guest.ask(&format!("mount -o remount,size=$(({used} + {kib}))k {place}"))
    }

    /// Runs the agent on a machine that reports `available_mib` of memory. The test cannot take real memory away.
    fn run_with_memory(&self, available_mib: u64) -> Result<Answer> {
        self.bed.guest.ask(&format!(
            "sed -E 's/^(MemAvailable|SwapFree):.*/\\1: 0 kB/; s/^MemAvailable:.*/MemAvailable: {} kB/' \
             </proc/meminfo >/run/meminfo && mount --bind /run/meminfo /proc/meminfo",
            available_mib << 10
        ))?;
        let answer = self.bed.guest.run("node-image-pivot run")?;
        self.bed.guest.ask("umount /proc/meminfo")?;
        Ok(answer)
    }
}

#[test]
fn too_little_room_is_refused_or_rolled_back() -> Result<()> {
    let mut suite = Suite::new("transaction: full file systems");
    let mut small = Small::new()?;
    suite.run(
        &mut small,
        &scenarios![
            too_little_memory_is_refused_with_numbers_before_a_byte_is_fetched,
            the_node_store_leaves_the_memory_that_the_refresh_needs,
            a_full_etc_is_refused_with_numbers,
            a_full_run_is_refused_with_numbers,
            an_etc_that_fills_up_after_the_check_is_rolled_back,
            a_system_with_room_again_is_switched,
            an_undo_on_a_full_etc_is_reported_and_completed_later after a_system_with_room_again_is_switched,
        ],
    );
    suite.finish()
}

fn too_little_memory_is_refused_with_numbers_before_a_byte_is_fetched(small: &mut Small) -> Result<()> {
    let answer = small.run_with_memory(64)?;
    same(answer.status, 11)?;
    contains(&answer.text, "too little memory: 64.0 MiB are needed (64.0 MiB for the refresh)")?;
    contains(&answer.text, "the running system is unchanged")?;
    same(small.bed.guest.status()?["progress"]["bytes_fetched"].as_u64(), Some(0))?;
    small.bed.guest.ask("test ! -e /run/node-image-pivot/store")?;
    small.bed.is_as_before(&small.before)
}

fn the_node_store_leaves_the_memory_that_the_refresh_needs(small: &mut Small) -> Result<()> {
    let answer = small.run_with_memory(72)?;
    same(answer.status, 11)?;
    contains(&answer.text, "of 8 MiB are free")?;
    small.bed.is_as_before(&small.before)
}

fn a_full_etc_is_refused_with_numbers(small: &mut Small) -> Result<()> {
    small.bed.agent("pull")?;
    small.leave("/run/small", 8)?;
    let answer = small.bed.guest.run("node-image-pivot run")?;
    small.bed.guest.ask("mount -o remount,size=64m /run/small")?;
    same(answer.status, 10)?;
    contains(&answer.text, "on the file system of /etc, which has 8.0 KiB free")?;
    small.bed.is_as_before(&small.before)
}

fn a_full_run_is_refused_with_numbers(small: &mut Small) -> Result<()> {
    small.bed.agent("pull")?;
    small.leave("/run", 80)?;
    let answer = small.bed.guest.run("node-image-pivot run")?;
    small.bed.guest.ask("mount -o remount,size=1g /run")?;
    same(answer.status, 10)?;
    contains(&answer.text, "on the file system of /run/node-image-pivot, which has 80.0 KiB free")?;
    small.bed.is_as_before(&small.before)
}

/// The agent makes the record of the merge after the check, right before the first act. The failpoint stops it there.
fn an_etc_that_fills_up_after_the_check_is_rolled_back(small: &mut Small) -> Result<()> {
    small.bed.agent("pull")?;
    small.bed.arm("etc-record", "sleep")?;
    let asked = small.bed.guest.run(&format!(
        "node-image-pivot run >/run/asked 2>&1 & asked=$!
         while [ -e /run/failpoints/armed ]; do sleep 0.02; done
         mount -o remount,size=$(($(df --output=used -k /run/small | tail -n 1) + {}))k /run/small
         wait $asked; status=$?; mount -o remount,size=64m /run/small; cat /run/asked; exit $status",
        16
    ))?;
    same(asked.status, 1)?;
    contains(&asked.text, "No space left on device")?;
    contains(&asked.text, "rolled back: /usr and /etc are unchanged")?;
    small.bed.is_undone(&small.before)
}

fn a_system_with_room_again_is_switched(small: &mut Small) -> Result<()> {
    small.bed.agent("run")?;
    same(small.bed.guest.ask("base-tool")?, "base-tool 2.0".into())?;
    small.bed.nothing_failed()
}

fn an_undo_on_a_full_etc_is_reported_and_completed_later(small: &mut Small) -> Result<()> {
    small.leave("/run/small", 0)?;
    let answer = small.bed.guest.run("node-image-pivot undo")?;
    small.bed.guest.ask("mount -o remount,size=64m /run/small")?;
    same(answer.status, 1)?;
    contains(&answer.text, "No space left on device")?;
    contains(&answer.text, "run undo, again if it fails")?;
    small.bed.agent("undo")?;
    same(small.bed.guest.ask("base-tool")?, "base-tool 1.0".into())?;
    same(small.bed.guest.ask("cat /etc/base-tool/removed-default.conf")?, "goes away".into())?;
    small.bed.nothing_failed()
}
