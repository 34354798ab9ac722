//! A system that is installed to a disk pivots, through power cuts and to two node images, and stays a system that ostree
//! can clean, check and deploy to. It deploys the first one to its own disk, boots it, and boots the old system again. On a
//! virtual machine. The disk does not have the agent: the initramfs of its boot loader entry carries it.
//! `make check-one NAME=disk`

mod deployed;
mod in_use;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::cuts::Recording;
use testbed::deliver;
use testbed::disk::{self, entry, on_disk};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Image, Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::vm::{self, Vm};

use deployed::{
    a_pivoted_system_deploys_its_node_image_to_its_own_disk,
    a_power_cut_during_the_deployment_leaves_the_old_or_the_new_system, etc_of_the_old_system_was_merged,
    ostree_ext_deploys_the_image_as_an_installer_without_a_download, put_ostree_ext, the_deployed_node_image_boots,
    the_node_image_needs_no_pivot, the_old_system_is_the_rollback, writes_to_the_disk_are_recorded,
};

const BOOT: Duration = Duration::from_secs(300);
const PIVOT: Duration = Duration::from_secs(600);
/// Directory of the agent in the repo.
const EXTENSION: &str = "/sysroot/ostree/repo/extensions/node-image-pivot";
const REF: &str = "refs/heads/coreos/node-image";
/// The list of defaults in /etc that came from node images.
const LIST: &str = "/sysroot/ostree/repo/extensions/node-image-pivot/etc-defaults.json";
/// A default that only the first node image changes.
const CHANGED: &str = "/etc/base-tool/changed-default.conf";
/// A default that only the first node image has.
const DROPPED: &str = "/etc/base-tool/new-default.conf";
/// Another one, which an administrator edits after the first pivot.
const EDITED: &str = "/etc/kubernetes/kubelet.conf";

type AnyGuest<'a> = &'a dyn Guest;

/// A machine with a disk, which is on or off.
struct Machine<'a> {
    images: &'a Images,
    expected: Expected<'a>,
    /// The configured node image.
    image: Image,
    registry: Registry,
    /// Directory with kernel and initramfs of the installed system.
    installed: PathBuf,
    /// Directory with kernel and initramfs of the next boot.
    kernel: PathBuf,
    disk: PathBuf,
    /// The writes of a boot.
    recording: Option<Recording>,
    /// Kernel arguments that name the deployment.
    kargs: String,
    /// The list of defaults that the first pivot left on the disk.
    defaults: String,
    before: Option<Before>,
    on: Option<Vm>,
}

impl<'a> Machine<'a> {
    fn new(images: &'a Images) -> Result<Self> {
        let expected = Expected::node_b(images.image("node-b")?);
        let registry = Registry::start(&images.storage, &work_dir("vm-disk-registry")?, None, None)?;
        let (stock, work, installed) =
            (images.stock_disk()?, work_dir("vm-disk-image")?, work_dir("vm-disk-installed")?);
        let (disk, image) = (disk::copy(&stock, &work)?, expected.image.clone());
        deliver::append_to_entries(&deliver::pack(&["initrd"], &image.by_digest(), &work)?, &disk)?;
        let kargs = disk::load_entry(&disk, &installed)?;
        std::fs::copy(stock.join("commit"), installed.join("commit"))?;
        let (kernel, defaults) = (installed.clone(), String::new());
        let (on, recording, before) = (None, None, None);
        Ok(Machine {
            images,
            expected,
            image,
            registry,
            installed,
            kernel,
            disk,
            recording,
            kargs,
            defaults,
            before,
            on,
        })
    }

    fn boot(&mut self) -> Result<()> {
        let setup = vm::Setup {
            medium: vm::Medium::Disk(&self.disk),
            recording: self.recording.as_ref(),
            kargs: &[self.kargs.trim()],
            memory_mib: 2048,
            ..vm::Setup::live("vm-disk", &self.kernel)
        };
        let (image, port) = (self.image.by_digest(), self.registry.port);
        let guest = Vm::start(self.images, &setup, |files| configured(files, &image, port))?;
        let guest = self.on.insert(guest);
        guest.wait_ssh(BOOT)?;
        // After a power cut, xfs shows a new file that nothing has synced as an empty one.
        guest.ask("sync /etc/ssh/ssh_host_*").map(drop)
    }

    fn guest(&self) -> Result<&Vm> {
        self.on.as_ref().context("the machine is off")
    }

    fn power_cut(&mut self) {
        if let Some(guest) = self.on.take() {
            guest.power_cut();
        }
    }
}

/// Adds the configuration of the machine, and the command.
fn configured(files: &Files, image: &str, port: u16) -> Result<()> {
    node_files(files, image, vm::HOST, port)?;
    deliver::command_file(files)
}

/// Checks all objects that a ref reaches.
fn fsck(disk: &Path) -> Result<()> {
    on_disk(disk, "ostree fsck -q --repo=ostree/repo").map(drop)
}

#[test]
fn an_installed_system_pivots_and_stays_an_ostree_system() -> Result<()> {
    let mut machine = Machine::new(Images::ensure()?)?;
    let mut suite = Suite::new("machine: installed to a disk, with a packed agent, power cuts, node image b");
    suite.part("first boot");
    suite.run(
        &mut machine,
        &scenarios![
            the_machine_boots,
            the_initramfs_of_the_entry_carried_the_agent after the_machine_boots,
            a_power_cut_in_the_middle_of_the_pull_comes after the_machine_boots,
            nothing_of_the_interrupted_pull_is_visible_and_the_repo_passes_fsck
                after a_power_cut_in_the_middle_of_the_pull_comes,
        ],
    );
    suite.part("second boot");
    suite.run(
        &mut machine,
        &scenarios![
            writes_to_the_disk_are_recorded,
            the_machine_boots,
            it_is_the_base_system_again after the_machine_boots,
        ],
    );
    becomes_the_node_image(&mut suite, &mut machine);
    if let Some(guest) = &machine.on {
        let earlier = "the_machine_becomes_its_node_image";
        pivoted(&mut suite, earlier, guest, machine.before.as_ref(), &machine.expected);
    }
    if let Some(guest) = &machine.on {
        is_stored_on_the_disk(&mut suite, "the_machine_becomes_its_node_image", guest);
    }
    suite.run_after("the_machine_becomes_its_node_image", &mut machine, &on_the_disk());
    suite.part("third boot, of the deployed node image");
    suite.run(
        &mut machine,
        &scenarios![
            the_repo_passes_fsck_after_a_power_cut_of_the_pivoted_system,
            a_power_cut_during_the_deployment_leaves_the_old_or_the_new_system
                after a_pivoted_system_deploys_its_node_image_to_its_own_disk,
            the_list_of_defaults_is_on_the_disk after an_administrator_edits_a_default_of_the_node_image,
            the_deployed_node_image_boots after a_pivoted_system_deploys_its_node_image_to_its_own_disk,
            the_node_image_needs_no_pivot after the_deployed_node_image_boots,
            the_old_system_is_the_rollback after the_deployed_node_image_boots,
            etc_of_the_old_system_was_merged after the_deployed_node_image_boots,
            no_unit_has_failed after the_deployed_node_image_boots,
        ],
    );
    suite.part("fourth boot, of the old system, with the next node image");
    suite.run(
        &mut machine,
        &scenarios![
            the_next_node_image_is_configured,
            the_machine_boots after the_next_node_image_is_configured,
            the_booted_deployment_is_the_old_one after the_machine_boots,
        ],
    );
    becomes_the_node_image(&mut suite, &mut machine);
    suite.run_after("the_machine_becomes_its_node_image", &mut machine, &from_the_disk());
    suite.run_after("the_list_of_defaults_is_on_the_disk", &mut machine, &with_the_list());
    suite.finish()
}

fn becomes_the_node_image(suite: &mut Suite, machine: &mut Machine<'_>) {
    suite.run_after(
        "the_machine_boots",
        machine,
        &scenarios![
            the_machine_becomes_its_node_image,
            no_unit_has_failed after the_machine_becomes_its_node_image,
        ],
    );
}

/// Runs the scenarios about a node image that the disk stores, after the scenario `earlier`.
fn is_stored_on_the_disk(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) {
    let list = scenarios![
        the_image_is_stored_in_the_repo_of_the_system_and_not_in_ram,
        the_repo_has_the_directory_of_this_boot_only,
        usr_consists_of_links_to_objects_of_the_repo,
        sysroot_is_read_only_for_other_processes,
        ostree_lists_the_booted_deployment,
        ostree_cleanup_keeps_the_node_image,
    ];
    suite.run_after(earlier, &mut guest, &list);
}

/// Returns the scenarios about a pivot that the disk stores, and about the next deployment.
fn on_the_disk<'a>() -> [Scenario<Machine<'a>>; 3] {
    scenarios![
        a_new_deployment_can_be_made,
        an_administrator_edits_a_default_of_the_node_image,
        a_pivoted_system_deploys_its_node_image_to_its_own_disk,
    ]
}

/// Returns the scenarios about a pivot to an image of which the disk has most objects.
fn from_the_disk<'a>() -> [Scenario<Machine<'a>>; 6] {
    scenarios![
        programs_are_those_of_the_next_node_image,
        only_the_objects_that_the_disk_lacks_are_stored,
        the_directory_of_the_last_boot_is_removed,
        the_ref_is_where_an_installer_to_the_existing_root_looks_for_it,
        usr_stays_readable_when_an_installer_deletes_the_ref_and_lets_ostree_clean,
        ostree_ext_deploys_the_image_as_an_installer_without_a_download,
    ]
}

/// Returns the scenarios about the defaults in /etc that the last pivot took.
fn with_the_list<'a>() -> [Scenario<Machine<'a>>; 5] {
    scenarios![
        an_untouched_default_of_the_last_node_image_is_replaced,
        a_default_that_the_next_node_image_lacks_is_removed,
        an_edited_default_of_the_last_node_image_is_kept,
        the_list_has_the_defaults_of_the_next_node_image,
        undo_restores_the_list_and_the_defaults_of_the_last_node_image
            after the_list_has_the_defaults_of_the_next_node_image,
    ]
}

fn the_machine_boots(machine: &mut Machine<'_>) -> Result<()> {
    machine.boot()
}

fn the_initramfs_of_the_entry_carried_the_agent(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("test ! -e /usr/bin/node-image-pivot && test -e /run/node-image-pivot/bin/node-image-pivot")?;
    contains(&guest.console(), "node-image-pivot: carried the agent into the real root")
}

fn a_power_cut_in_the_middle_of_the_pull_comes(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    wait_for("objects", Duration::from_secs(240), || {
        Ok(guest.status()?["progress"]["objects_done"].as_u64().unwrap_or(0) >= 100)
    })?;
    guest.ask(&format!("test -d {EXTENSION}/boot-*/incoming"))?;
    machine.power_cut();
    Ok(())
}

fn nothing_of_the_interrupted_pull_is_visible_and_the_repo_passes_fsck(machine: &mut Machine<'_>) -> Result<()> {
    same(on_disk(&machine.disk, "ostree refs --repo=ostree/repo --list coreos")?, String::new())?;
    fsck(&machine.disk)
}

fn it_is_the_base_system_again(machine: &mut Machine<'_>) -> Result<()> {
    machine.before = Some(Before::of(machine.guest()?)?);
    Ok(())
}

fn the_machine_becomes_its_node_image(machine: &mut Machine<'_>) -> Result<()> {
    wait_pivoted(machine.guest()?, PIVOT)
}

fn no_unit_has_failed(machine: &mut Machine<'_>) -> Result<()> {
    nothing_failed(machine.guest()?)
}

/// Also after a pull that an earlier boot began.
fn the_repo_has_the_directory_of_this_boot_only(guest: &mut AnyGuest<'_>) -> Result<()> {
    let id = guest.ask("cat /proc/sys/kernel/random/boot_id")?;
    same(guest.ask(&format!("cd {EXTENSION} && echo boot-*"))?, format!("boot-{id}"))
}

fn the_image_is_stored_in_the_repo_of_the_system_and_not_in_ram(guest: &mut AnyGuest<'_>) -> Result<()> {
    same(guest.status()?["cost"]["ram_store_bytes"].as_u64(), Some(0))?;
    guest.ask("! findmnt -n -S node-image-store").map(drop)
}

fn usr_consists_of_links_to_objects_of_the_repo(guest: &mut AnyGuest<'_>) -> Result<()> {
    let links: u32 = guest.ask(&format!("stat -c %h {EXTENSION}/boot-*/usr/bin/oc"))?.parse()?;
    // du counts a file once: its size for this directory is the size of files that the repo does not have.
    let own: u64 =
        guest.ask(&format!("du -sm /sysroot/ostree/repo/objects {EXTENSION} | tail -n 1 | cut -f 1"))?.parse()?;
    if links < 2 || own > 40 {
        bail!("{links} links, {own} MiB beside the repo");
    }
    Ok(())
}

fn sysroot_is_read_only_for_other_processes(guest: &mut AnyGuest<'_>) -> Result<()> {
    contains(&guest.ask("findmnt -n -o OPTIONS /sysroot")?, "ro")?;
    same(guest.run("touch /sysroot/x")?.status, 1)
}

fn ostree_lists_the_booted_deployment(guest: &mut AnyGuest<'_>) -> Result<()> {
    contains(&guest.ask("ostree admin status")?, "* testbed ")
}

fn ostree_cleanup_keeps_the_node_image(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.ask("ostree admin cleanup")?;
    contains(&guest.ask("ostree refs --repo=/sysroot/ostree/repo")?, "coreos/node-image")?;
    guest.ask("ostree ls -R --repo=/sysroot/ostree/repo coreos/node-image /usr/bin")?;
    guest.ask("oc version --client").map(drop)
}

fn a_new_deployment_can_be_made(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    let make = "mount -o remount,rw /sysroot && cd /sysroot/ostree && \
                ostree commit --repo=repo --branch=later --tree=ref=testbed/bootimage --bootable";
    guest.ask(&format!("unshare -m sh -c '{make}'"))?;
    // With a merge of /etc, ostree would rebuild the SELinux policy. That needs bubblewrap, which the test trees lack.
    guest.ask("ostree admin deploy --no-merge --os=testbed later")?;
    contains(&guest.ask("ostree admin status")?, "(pending)")?;
    guest.ask("ostree admin undeploy 0").map(drop)
}

fn an_administrator_edits_a_default_of_the_node_image(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask(&format!("cat {CHANGED} {DROPPED}"))?, "default of 2.0\narrives".into())?;
    // An editor syncs. The merge must not need that.
    guest.ask(&format!("echo '# edited here' >>{EDITED} && sync {EDITED}")).map(drop)
}

fn the_repo_passes_fsck_after_a_power_cut_of_the_pivoted_system(machine: &mut Machine<'_>) -> Result<()> {
    machine.power_cut();
    fsck(&machine.disk)
}

fn the_list_of_defaults_is_on_the_disk(machine: &mut Machine<'_>) -> Result<()> {
    machine.defaults = on_disk(&machine.disk, &format!("cat {}", LIST.trim_start_matches("/sysroot/")))?;
    [CHANGED, DROPPED, EDITED].iter().try_for_each(|path| contains(&machine.defaults, path.trim_start_matches("/etc/")))
}

fn the_next_node_image_is_configured(machine: &mut Machine<'_>) -> Result<()> {
    machine.power_cut();
    machine.registry.resume()?;
    machine.image = machine.images.image("node-small")?.clone();
    machine.kernel.clone_from(&machine.installed);
    machine.kargs = entry(&machine.disk, 2)?;
    put_ostree_ext(machine)
}

fn the_booted_deployment_is_the_old_one(machine: &mut Machine<'_>) -> Result<()> {
    let old = std::fs::read_to_string(machine.installed.join("commit"))?;
    contains(&machine.guest()?.ask("ostree admin status")?, &format!("* testbed {}.0", old.trim()))
}

fn programs_are_those_of_the_next_node_image(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    guest.ask("oc version --client && test -e /usr/lib/systemd/system/small-enabled.service").map(drop)
}

fn only_the_objects_that_the_disk_lacks_are_stored(machine: &mut Machine<'_>) -> Result<()> {
    let stored = machine.guest()?.status()?["progress"]["objects_done"].as_u64().context("no objects_done")?;
    if !(1..100).contains(&stored) {
        bail!("{stored} objects were stored");
    }
    Ok(())
}

fn an_untouched_default_of_the_last_node_image_is_replaced(machine: &mut Machine<'_>) -> Result<()> {
    same(machine.guest()?.ask(&format!("cat {CHANGED}"))?, "default of 1.0".into())
}

fn a_default_that_the_next_node_image_lacks_is_removed(machine: &mut Machine<'_>) -> Result<()> {
    machine.guest()?.ask(&format!("test ! -e {DROPPED}")).map(drop)
}

fn an_edited_default_of_the_last_node_image_is_kept(machine: &mut Machine<'_>) -> Result<()> {
    same(machine.guest()?.ask(&format!("cat {EDITED}"))?, "healthz=127.0.0.1:10248\n# edited here".into())
}

fn the_list_has_the_defaults_of_the_next_node_image(machine: &mut Machine<'_>) -> Result<()> {
    let text = machine.guest()?.ask(&format!("cat {LIST}"))?;
    let list = |text: &str| serde_json::from_str::<serde_json::Value>(text);
    let (name, first, next) = (&CHANGED["/etc/".len()..], list(&machine.defaults)?, list(&text)?);
    if first[name] == next[name] || next[name].is_null() {
        bail!("{name}: {} was followed by {}", first[name], next[name]);
    }
    Ok(())
}

fn undo_restores_the_list_and_the_defaults_of_the_last_node_image(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("node-image-pivot undo && test ! -e /usr/bin/oc")?;
    same(guest.ask(&format!("cat {CHANGED} {DROPPED}"))?, "default of 2.0\narrives".into())?;
    same(guest.ask(&format!("cat {LIST}"))?, machine.defaults.clone())
}

fn the_directory_of_the_last_boot_is_removed(machine: &mut Machine<'_>) -> Result<()> {
    the_repo_has_the_directory_of_this_boot_only(&mut (machine.guest()? as AnyGuest<'_>))
}

fn the_ref_is_where_an_installer_to_the_existing_root_looks_for_it(machine: &mut Machine<'_>) -> Result<()> {
    machine.guest()?.ask(&format!("stat /ostree/repo/{REF}")).map(drop)
}

/// Acts as the assisted installer does on the repo of a pivoted system, before it deploys there.
fn usr_stays_readable_when_an_installer_deletes_the_ref_and_lets_ostree_clean(machine: &mut Machine<'_>) -> Result<()> {
    let guest = machine.guest()?;
    let acts = "mount -o remount,rw /sysroot && ostree refs --repo /ostree/repo --delete coreos/node-image && \
                touch /ostree/repo/tmp/node-image && ostree admin cleanup && ostree prune --refs-only --repo=/ostree/repo";
    guest.ask(&format!("unshare -m sh -c '{acts}'"))?;
    guest.ask(&format!("test ! -e /ostree/repo/{REF} && find /usr -xdev -type f -exec cat {{}} + >/dev/null"))?;
    guest.ask("oc version --client").map(drop)
}
