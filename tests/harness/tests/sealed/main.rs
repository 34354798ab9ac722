//! A system with a composefs root is installed to a file system with fs-verity, and its repo demands it. It pivots, and
//! deploys its node image with sealed objects. The deployment boots with a root that reads no others, and the old system
//! boots and pivots again. The same system pivots from live media. On virtual machines.
//! `make check-sealed`

mod live;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::disk::{self, on_disk};
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::overlays::{has_one_overlay, undoes};
use testbed::proc::succeed;
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::table::Flow;
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(600);
const PIVOT: Duration = Duration::from_secs(900);
const DEPLOY: &str = "node-image-pivot deploy --sysroot / --stateroot testbed";
const REPO: &str = "/sysroot/ostree/repo";

/// A machine with a disk, which is on or off.
struct Machine {
    pair: Pair,
    registry: Registry,
    disk: PathBuf,
    /// Directory with kernel and initramfs of the next boot.
    kernel: PathBuf,
    /// Kernel arguments that name the deployment.
    kargs: String,
    before: Option<Before>,
    on: Option<Vm>,
}

impl Machine {
    fn new(pair: Pair) -> Result<Self> {
        let registry = Registry::start(&pair.storage, &work_dir("vm-sealed-registry")?, None, None)?;
        let disk = disk::copy(&pair.boot, &work_dir("vm-sealed-image")?)?;
        let kargs = std::fs::read_to_string(pair.boot.join("kargs"))?;
        Ok(Machine { kernel: pair.boot.clone(), pair, registry, disk, kargs, before: None, on: None })
    }

    fn boot(&mut self) -> Result<()> {
        let setup = vm::Setup {
            medium: vm::Medium::Disk(&self.disk),
            kargs: &[self.kargs.trim()],
            ..vm::Setup::live("vm-sealed", &self.kernel)
        };
        let (image, port) = (self.pair.image.by_digest(), self.registry.port);
        let guest = Vm::start(&self.pair, &setup, |files| node_files(files, &image, vm::HOST, port))?;
        self.on.insert(guest).wait_ssh(BOOT)
    }

    /// Selects a boot loader entry for the next boot. The first one is the default.
    fn select(&mut self, number: u32) -> Result<()> {
        if let Some(guest) = self.on.take() {
            guest.ask("sync")?;
            guest.power_cut();
        }
        let key = |key: &str| {
            let entry = format!("$(ls boot/loader/entries/*.conf | sort -rV | sed -n {number}p)");
            on_disk(&self.disk, &format!("sed -n 's/^{key} //p' {entry}"))
        };
        self.kargs = disk::entry(&self.disk, number)?;
        self.kernel = work_dir("vm-sealed-boot")?;
        for (kind, name) in [("linux", "vmlinuz"), ("initrd", "initramfs.img")] {
            // The kernel of this machine may read no sealed file.
            let (from, to) = (format!("/boot{}", key(kind)?.trim_start_matches("/boot")), self.kernel.join(name));
            let dump = format!("dump {from} {}", to.display());
            succeed(Command::new("debugfs").args(["-R", &dump]).arg(&self.disk))?;
        }
        Ok(())
    }

    fn guest(&self) -> Result<&Vm> {
        self.on.as_ref().context("the machine is off")
    }

    /// Returns the path of the composefs image of the deployment that boots next.
    fn image_of_the_next_root(&self) -> Result<String> {
        let images = "ls /sysroot/ostree/deploy/testbed/deploy/*/.ostree.cfs";
        self.guest()?.ask(&format!("{images} | grep -v {}", self.installed()?))
    }

    /// Returns the commit of the installed system.
    fn installed(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.pair.boot.join("commit"))?.trim().to_owned())
    }
}

#[test]
fn a_system_with_a_composefs_root_pivots_and_deploys_sealed_objects() -> Result<()> {
    let mut machine = Machine::new(Pair::sealed()?)?;
    let mut suite = Suite::new("machine: installed with a composefs root, fs-verity demanded");
    suite.part("first boot");
    suite.run(
        &mut machine,
        &scenarios![
            the_machine_boots,
            the_root_is_a_composefs_without_fs_verity after the_machine_boots,
        ],
    );
    becomes_the_node_image(&mut suite, &mut machine);
    if let Some(guest) = &machine.on {
        let expected = Expected::node_a(&machine.pair.image);
        pivoted(&mut suite, "the_machine_becomes_its_node_image", guest, machine.before.as_ref(), &expected);
    }
    suite.run_after(
        "the_machine_becomes_its_node_image",
        &mut machine,
        &scenarios![
            the_node_store_is_in_ram_and_the_journal_has_the_reason,
            the_node_image_is_deployed_to_the_own_sysroot,
            each_object_of_the_node_image_is_sealed after the_node_image_is_deployed_to_the_own_sysroot,
            the_image_of_its_root_is_sealed after the_node_image_is_deployed_to_the_own_sysroot,
            a_deployment_that_lacks_fs_verity_is_written_again after the_image_of_its_root_is_sealed,
        ],
    );
    suite.part("second boot, of the deployed node image");
    suite.run_after(
        "the_node_image_is_deployed_to_the_own_sysroot",
        &mut machine,
        &scenarios![
            the_deployed_node_image_boots_without_a_registry,
            the_root_reads_only_files_with_fs_verity after the_deployed_node_image_boots_without_a_registry,
            each_file_of_the_system_is_readable after the_deployed_node_image_boots_without_a_registry,
            the_old_system_is_the_rollback after the_deployed_node_image_boots_without_a_registry,
            no_unit_has_failed after the_deployed_node_image_boots_without_a_registry,
        ],
    );
    suite.part("third boot, of the old system, whose repo no longer demands fs-verity");
    suite.run_after(
        "the_node_image_is_deployed_to_the_own_sysroot",
        &mut machine,
        &scenarios![
            the_old_system_boots,
            the_root_is_a_composefs_without_fs_verity after the_old_system_boots,
        ],
    );
    becomes_the_node_image(&mut suite, &mut machine);
    if let Some(guest) = &machine.on {
        stores_on_the_disk(&mut suite, "the_machine_becomes_its_node_image", guest);
    }
    let on_the_disk = scenarios![no_object_is_stored_again, the_ref_of_the_node_image_can_be_deployed];
    suite.run_after("the_machine_becomes_its_node_image", &mut machine, &on_the_disk);
    if let Some(guest) = &machine.on {
        undoes(&mut suite, "the_machine_becomes_its_node_image", guest);
        suite.covers(guest, Flow::Bootstrap, "a_system_with_a_composefs_root_pivots_and_deploys_sealed_objects");
    }
    suite.finish()
}

fn becomes_the_node_image(suite: &mut Suite, machine: &mut Machine) {
    suite.run_after(
        "the_root_is_a_composefs_without_fs_verity",
        machine,
        &scenarios![
            the_machine_becomes_its_node_image,
            no_unit_has_failed after the_machine_becomes_its_node_image,
        ],
    );
    if let Some(guest) = &machine.on {
        has_one_overlay(suite, "the_machine_becomes_its_node_image", guest);
    }
}

/// Runs the scenario about the node store of a machine whose repo does not demand fs-verity.
fn stores_on_the_disk(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) {
    suite.run_after(earlier, &mut guest, &scenarios![the_node_store_is_on_the_disk]);
}

fn the_machine_boots(machine: &mut Machine) -> Result<()> {
    machine.boot()
}

fn the_root_is_a_composefs_without_fs_verity(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    let before = Before::of(guest)?;
    has_a_composefs_root_without_fs_verity(guest)?;
    machine.before = Some(before);
    Ok(())
}

fn has_a_composefs_root_without_fs_verity(guest: &Vm) -> Result<()> {
    let root = guest.ask("findmnt -n -o SOURCE,FSTYPE,OPTIONS /")?;
    contains(&root, "composefs overlay ")?;
    match root.contains("verity=require") {
        true => bail!("{root}"),
        false => Ok(()),
    }
}

fn the_machine_becomes_its_node_image(machine: &mut Machine) -> Result<()> {
    wait_pivoted(machine.guest()?, PIVOT)
}

fn no_unit_has_failed(machine: &mut Machine) -> Result<()> {
    nothing_failed(machine.guest()?)
}

fn the_node_store_is_in_ram_and_the_journal_has_the_reason(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("test -d /run/node-image-pivot/store/repo")?;
    guest.ask("journalctl -b -u node-image-pivotd.service | grep 'must have fs-verity'").map(drop)
}

fn the_node_image_is_deployed_to_the_own_sysroot(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    let done = guest.ask(DEPLOY)?;
    println!("       {done}");
    contains(&done, "in the stateroot testbed boots commit")?;
    contains(&guest.ask(DEPLOY)?, "nothing to do")
}

/// Objects of the bootimage are among them, which had no fs-verity before the deployment.
fn each_object_of_the_node_image_is_sealed(machine: &mut Machine) -> Result<()> {
    let commit = machine.pair.image.commit.as_deref().context("the image has no commit")?;
    let files = format!(
        "ostree ls --repo={REPO} -RC {commit} / | sed -n 's/^-[^/]* \\([0-9a-f]\\{{64\\}}\\) .*/\\1/p' | sort -u"
    );
    let paths = format!("{files} | sed 's,^..,{REPO}/objects/&/,; s,$,.file,'");
    let sealed = machine.guest()?.ask(&format!("{paths} | xargs lsattr | cut -d' ' -f1 | grep -c V"))?;
    let all = machine.guest()?.ask(&format!("{files} | wc -l"))?;
    println!("       {sealed} of {all} objects");
    same(sealed, all)
}

fn the_image_of_its_root_is_sealed(machine: &mut Machine) -> Result<()> {
    let image = machine.image_of_the_next_root()?;
    contains(machine.guest()?.ask(&format!("lsattr {image}"))?.split(' ').next().unwrap_or_default(), "V")
}

/// An earlier release of the agent may have written it.
fn a_deployment_that_lacks_fs_verity_is_written_again(machine: &mut Machine) -> Result<()> {
    let commit = machine.pair.image.commit.as_deref().context("the image has no commit")?;
    let object = format!("ostree ls --repo={REPO} -C {commit} /usr/bin/oc | grep -o '[0-9a-f]\\{{64\\}}'");
    let object = machine.guest()?.ask(&format!("{object} | sed 's,^..,{REPO}/objects/&/,; s,$,.file,'"))?;
    for file in [machine.image_of_the_next_root()?, object] {
        let guest = machine.guest()?;
        let replace = "chattr -i $(dirname $0) && cp -a $0 $0.new && mv $0.new $0 && lsattr $0";
        let unsealed = guest.ask(&format!("unshare -m sh -c 'mount -o remount,rw /sysroot && {replace}' {file}"))?;
        same(unsealed.split(' ').next().unwrap_or_default().contains('V'), false)?;
        contains(&guest.ask(DEPLOY)?, "wrote 0 objects")?;
        contains(&guest.ask(DEPLOY)?, "nothing to do")?;
    }
    each_object_of_the_node_image_is_sealed(machine)?;
    the_image_of_its_root_is_sealed(machine)
}

fn the_deployed_node_image_boots_without_a_registry(machine: &mut Machine) -> Result<()> {
    machine.registry.stop();
    machine.select(1)?;
    machine.boot()?;
    let guest = machine.guest()?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
    guest.ask("oc version --client && ! findmnt --mountpoint /usr").map(drop)
}

fn the_root_reads_only_files_with_fs_verity(machine: &mut Machine) -> Result<()> {
    contains(&machine.guest()?.ask("findmnt -n -o OPTIONS /")?, "verity=require")
}

fn each_file_of_the_system_is_readable(machine: &mut Machine) -> Result<()> {
    machine.guest()?.ask("find /usr -xdev -type f -exec cat {} + >/dev/null").map(drop)
}

fn the_old_system_is_the_rollback(machine: &mut Machine) -> Result<()> {
    let old = machine.installed()?;
    contains(&machine.guest()?.ask("ostree admin status")?, &format!("testbed {old}.0 (rollback)"))
}

fn the_old_system_boots(machine: &mut Machine) -> Result<()> {
    machine.registry.resume()?;
    machine.select(2)?;
    on_disk(&machine.disk, "ostree config --repo=ostree/repo set ex-integrity.fsverity no")?;
    machine.boot()
}

/// The objects of the image have fs-verity since the deployment. The disk has all of them.
fn no_object_is_stored_again(machine: &mut Machine) -> Result<()> {
    same(machine.guest()?.status()?["progress"]["objects_done"].as_u64().unwrap_or(0), 0)
}

fn the_node_store_is_on_the_disk(guest: &mut &dyn Guest) -> Result<()> {
    same(guest.status()?["cost"]["ram_store_bytes"].as_u64(), Some(0))?;
    guest.ask("! findmnt -n -S node-image-store")?;
    let links: u32 = guest.ask(&format!("stat -c %h {REPO}/extensions/node-image-pivot/boot-*/usr/bin/oc"))?.parse()?;
    match links {
        0 | 1 => bail!("a file of the new /usr is not a link to an object of the repo"),
        _ => Ok(()),
    }
}

/// The undeployment lets ostree remove all objects that no ref reaches.
fn the_ref_of_the_node_image_can_be_deployed(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("ostree admin undeploy 0 && ! ostree admin status | grep -v '^\\*' | grep '^ *testbed'")?;
    guest.ask("ostree admin deploy --os=testbed coreos/node-image")?;
    let commit = machine.pair.image.commit.as_deref().context("the image has no commit")?;
    contains(&guest.ask("ostree admin status")?, &format!("testbed {commit}.0 (pending)"))?;
    guest.ask("oc version --client").map(drop)
}
