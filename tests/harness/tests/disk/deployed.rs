//! The pivoted system deploys its node image to its own disk. The next boot is the node image, and the old system is the
//! rollback.

use anyhow::{Context, Result, bail};
use testbed::check::{contains, same};
use testbed::cuts::{Recording, bootable};
use testbed::disk;
use testbed::guest::Guest;
use testbed::images::work_dir;

use super::{EDITED, Machine};

/// ostree runs bubblewrap after the merge of /etc, to rebuild the SELinux policy. The test trees lack it.
const BUBBLEWRAP: &str = "mkdir /run/more && printf '#!/bin/sh\\n' >/run/more/bwrap && chmod +x /run/more/bwrap && \
                          mount -t overlay more -o lowerdir=/run/more:/usr/bin /usr/bin";

pub(super) fn a_pivoted_system_deploys_its_node_image_to_its_own_disk(machine: &mut Machine<'_>) -> Result<()> {
    machine.guest()?.ask(&format!("{BUBBLEWRAP} && sync"))?;
    machine.recording.as_mut().context("the writes are not recorded")?.begin()?;
    let guest = machine.guest()?;
    let deploy = "node-image-pivot deploy --sysroot / --stateroot testbed --karg node.deployed";
    let done = guest.ask(deploy)?;
    println!("       {done}");
    // The store is the repo of the disk.
    contains(&done, "in the stateroot testbed boots commit")?;
    contains(&done, "wrote 0 objects")?;
    contains(&guest.ask(deploy)?, "nothing to do")?;
    // The shell of the connection runs from there.
    guest.ask("umount --lazy /usr/bin && oc version --client")?;
    contains(&guest.ask("findmnt -n -o OPTIONS /sysroot")?, "ro")?;
    same(guest.run("touch /sysroot/x")?.status, 1)
}

pub(super) fn writes_to_the_disk_are_recorded(machine: &mut Machine<'_>) -> Result<()> {
    machine.recording = Some(Recording::new(&work_dir("vm-disk-writes")?));
    Ok(())
}

pub(super) fn a_power_cut_during_the_deployment_leaves_the_old_or_the_new_system(
    machine: &mut Machine<'_>,
) -> Result<()> {
    let recording = machine.recording.take().context("the writes are not recorded")?;
    let new = bootable(&machine.disk)?;
    let old = std::fs::read_to_string(machine.installed.join("commit"))?;
    recording.replay(|disk| {
        let found = bootable(disk)?;
        println!("       boots {found:?}");
        match found.iter().any(|commit| commit == old.trim()) && (found == new || found[0] != new[0]) {
            true => Ok(()),
            false => bail!("boots {found:?} instead of {new:?} or {old}"),
        }
    })
}

/// The registry is down. The disk's kernel and initramfs are those of the node image.
pub(super) fn the_deployed_node_image_boots(machine: &mut Machine<'_>) -> Result<()> {
    machine.registry.stop();
    machine.kernel = work_dir("vm-disk-new-boot")?;
    machine.kargs = disk::load_entry(&machine.disk, &machine.kernel)?;
    contains(&machine.kargs, "node.deployed")?;
    machine.boot()
}

pub(super) fn the_node_image_needs_no_pivot(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    contains(&guest.ask("cat /usr/lib/os-release")?, machine.expected.os)?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    guest.ask("oc version --client && test -e /usr/lib/modules/$(uname -r) && ! findmnt -n -t overlay /usr").map(drop)
}

pub(super) fn the_old_system_is_the_rollback(machine: &mut Machine<'_>) -> Result<()> {
    let status = machine.guest()?.ask("ostree admin status")?;
    let old = std::fs::read_to_string(machine.installed.join("commit"))?;
    contains(&status, "* testbed ")?;
    contains(&status, &format!("testbed {}.0 (rollback)", old.trim()))
}

pub(super) fn etc_of_the_old_system_was_merged(machine: &mut Machine<'_>) -> Result<()> {
    same(machine.guest()?.ask(&format!("tail -n 1 {EDITED}"))?, "# edited here".into())
}
