//! The pivoted system deploys its node image to its own disk. The next boot is the node image, and the old system is the
//! rollback.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::cuts::{self, Recording, bootable};
use testbed::disk;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{self, Image, Images, work_dir};
use testbed::page;
use testbed::scenario::wait_pivoted;
use testbed::vm::Vm;

use super::{EDITED, Machine, PIVOT, configured};

/// ostree runs bubblewrap after the merge of /etc, to rebuild the SELinux policy. The test trees lack it.
const BUBBLEWRAP: &str = "mkdir /run/more && printf '#!/bin/sh\\n' >/run/more/bwrap && chmod +x /run/more/bwrap && \
                          mount -t overlay more -o lowerdir=/run/more:/usr/bin /usr/bin";

/// The program that acts as `ostree container image`.
const OSTREE_EXT: &str = "/var/ostree-ext ";

/// Returns the command of docs/single-node.md with a kernel argument.
fn deploy() -> String {
    format!("{} --karg node.deployed", page::commands().deploy_own.replace("NAME", "testbed"))
}

pub(super) fn a_pivoted_system_deploys_its_node_image_to_its_own_disk(machine: &mut Machine<'_>) -> Result<()> {
    machine.guest()?.ask(&format!("{BUBBLEWRAP} && sync"))?;
    machine.recording.as_mut().context("the writes are not recorded")?.begin()?;
    let guest = machine.guest()?;
    let done = guest.ask(&deploy())?;
    println!("       {done}");
    // The store is the repo of the disk.
    contains(&done, "in the stateroot testbed boots commit")?;
    contains(&done, "wrote 0 objects")?;
    contains(&guest.ask(&deploy())?, "nothing to do")?;
    // The shell of the connection runs from there.
    guest.ask("umount --lazy /usr/bin && oc version --client")?;
    contains(&guest.ask("findmnt -n -o OPTIONS /sysroot")?, "ro")?;
    same(guest.run("touch /sysroot/x")?.status, 1)
}

pub(super) fn writes_to_the_disk_are_recorded(machine: &mut Machine<'_>) -> Result<()> {
    machine.recording = Some(Recording::new(&work_dir("vm-disk-writes")?));
    Ok(())
}

/// Each power cut is followed by boots if the number of cuts is given.
pub(super) fn a_power_cut_during_the_deployment_leaves_the_old_or_the_new_system(
    machine: &mut Machine<'_>,
) -> Result<()> {
    let recording = machine.recording.take().context("the writes are not recorded")?;
    let new = bootable(&machine.disk)?;
    let old = std::fs::read_to_string(machine.installed.join("commit"))?.trim().to_owned();
    let [new, rollback] = new.try_into().map_err(|found| anyhow!("boots {found:?}"))?;
    same(&rollback, &old)?;
    let after = AfterCut { images: machine.images, image: &machine.image, port: machine.registry.port, old, new };
    recording.replay(|cut, disk| after.check(cut, disk))
}

/// A disk after a power cut during the deployment to the own sysroot.
struct AfterCut<'a> {
    images: &'a Images,
    image: &'a Image,
    port: u16,
    /// Commit of the old system, and of the new one.
    old: String,
    new: String,
}

impl AfterCut<'_> {
    fn check(&self, cut: usize, disk: &Path) -> Result<()> {
        let (found, old, new) = (bootable(disk)?, [&self.old], [&self.new, &self.old]);
        println!("       cut {cut}: boots {found:?}");
        match (found.iter().eq(old), found.iter().eq(new), cuts::asked()?) {
            (false, false, _) => bail!("boots {found:?} instead of {old:?} or {new:?}"),
            (_, _, None) => Ok(()),
            (true, ..) => self.the_old_system_boots_and_deploys_again(cut, disk),
            (_, true, _) => self.the_new_system_boots(cut, disk),
        }
    }

    fn boot(&self, cut: usize, disk: &Path, commit: &str) -> Result<Vm> {
        let files = |files: &Files| configured(files, &self.image.by_digest(), self.port);
        let guest = Vm::boot_disk(self.images, &format!("vm-disk-cut-{cut}"), disk, files)?;
        contains(&guest.ask("ostree admin status")?, &format!("* testbed {commit}."))?;
        Ok(guest)
    }

    fn the_old_system_boots_and_deploys_again(&self, cut: usize, disk: &Path) -> Result<()> {
        let guest = self.boot(cut, disk, &self.old)?;
        wait_pivoted(&guest, PIVOT)?;
        nothing_failed(&guest)?;
        contains(&guest.ask(&format!("{BUBBLEWRAP} && {}", deploy()))?, "in the stateroot testbed boots commit")?;
        guest.power_cut();
        same(bootable(disk)?, vec![self.new.clone(), self.old.clone()])?;
        self.the_new_system_boots(cut, disk)
    }

    fn the_new_system_boots(&self, cut: usize, disk: &Path) -> Result<()> {
        let guest = self.boot(cut, disk, &self.new)?;
        contains(&guest.ask("ostree admin status")?, &format!("testbed {}.0 (rollback)", self.old))?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
        guest.ask("oc version --client && ! findmnt -n -t overlay /usr")?;
        nothing_failed(&guest)
    }
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

/// Acts as the assisted installer does on the existing root, after the rest of the image was fetched. No layer is fetched again.
pub(super) fn ostree_ext_deploys_the_image_as_an_installer_without_a_download(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("node-image-pivot pull --complete")?;
    let served = || machine.registry.served_layers(&machine.images.storage, &machine.image);
    let (before, image) = (served()?, machine.image.by_digest());
    let deploy = page::commands().ostree_ext.replace("NAME", "testbed").replace("IMAGE", &image);
    let deploy = deploy.replace("ostree container image ", OSTREE_EXT).replace("--imgref ", "");
    let acts = format!(
        "mount -o remount,rw /sysroot && mount -o remount,rw /boot && \
         ostree refs --repo /ostree/repo --delete coreos/node-image && touch /ostree/repo/tmp/node-image && {deploy}"
    );
    guest.ask(&format!("{BUBBLEWRAP} && unshare -m sh -c '{acts}'"))?;
    guest.ask("umount --lazy /usr/bin && oc version --client")?;
    same(served()?, before)?;
    println!("       {} of {} bytes were served in all", before.0, before.1);
    contains(&guest.ask("ostree admin status")?, "(staged)")?;
    let origins = guest.ask("cat /sysroot/ostree/deploy/testbed/deploy/*.origin")?;
    contains(&origins, &format!("container-image-reference=ostree-unverified-registry:{image}"))
}

/// Puts the program of [`ostree_ext_deploys_the_image_as_an_installer_without_a_download`] on the disk.
pub(super) fn put_ostree_ext(machine: &Machine<'_>) -> Result<()> {
    let program = images::ostree_ext()?;
    let copy = format!("cp '{}' ostree/deploy/testbed{}", program.display(), OSTREE_EXT.trim_end());
    disk::on_disk(&machine.disk, &copy).map(drop)
}
