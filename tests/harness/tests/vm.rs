//! Pivots on virtual machines: kernel, initramfs, systemd and registry are real.
//! `make check-one NAME=vm`

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::cuts::{self, Recording, bootable};
use testbed::deliver;
use testbed::guest::Guest;
use testbed::ignition;
use testbed::images::{Images, work_dir};
use testbed::page::{self, Commands, FOLLOWED};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, configured_later, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::{left_alone, waits_and_says_why};
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(300);
const PIVOT: Duration = Duration::from_secs(600);

/// A machine, the registry that it pulls from, and what is expected of it.
struct Bed<'a> {
    guest: Vm,
    registry: Registry,
    expected: Expected<'a>,
    before: Option<Before>,
}

fn setup<'a>(name: &'a str, images: &'a Images) -> vm::Setup<'a> {
    vm::Setup::live(name, &images.boot)
}

fn base_tool_of_a_login(guest: &Vm) -> Result<String> {
    Ok(guest.login("base-tool")?.text.trim().into())
}

/// Debian 13 over Debian 12; the registry is down at first. The image will be deployed, so the pull is complete. The bootimage
/// does not have the agent: Ignition writes it in the initramfs of the first boot.
#[test]
fn the_next_release_is_pulled_once_the_registry_is_back() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_a(images.image("node-a")?);
    let mut suite =
        Suite::new("machine: stock Debian 12 with Ignition becomes node image a (Debian 13), the registry comes late");
    let mut registry = Registry::start(&images.storage, &work_dir("vm-a-registry")?, None, None)?;
    registry.stop();
    let disk = work_dir("vm-a-disk")?.join("disk.img");
    File::create(&disk)?.set_len(4 << 30)?;
    let recording = Recording::new(&work_dir("vm-a-writes")?);
    let boot = work_dir("vm-a-boot")?;
    ignition::bootimage(images, &expected.image.by_digest(), &boot)?;
    let drives = vm::Setup {
        boot: &boot,
        kargs: &ignition::KARGS,
        spare: Some(&disk),
        recording: Some(&recording),
        ..setup("vm-a", images)
    };
    let guest = Vm::start(images, &drives, |files| {
        deliver::stock_files(files, registry.port)?;
        ignition::first_boot_files(files)?;
        files.put("/etc/node-image-pivot.conf.d/60-complete.toml", 0o644, "complete = true\n")
    })?;
    let mut bed = Bed { guest, registry, expected, before: None };
    suite.run(&mut bed, &scenarios![ssh_answers, the_base_system_runs after ssh_answers]);
    ignition::set_up(&mut suite, "the_base_system_runs", &bed.guest);
    waits_and_says_why(&mut suite, Some("the_base_system_runs"), &bed.guest);
    suite.run_after(
        "the_base_system_runs",
        &mut bed,
        &scenarios![
            the_console_takes_a_login_while_the_registry_is_down,
            a_new_ssh_login_works_while_the_registry_is_down,
            the_pull_begins_by_itself_once_the_registry_is_back,
            logins_work_during_the_pull after the_pull_begins_by_itself_once_the_registry_is_back,
            the_machine_becomes_its_node_image,
        ],
    );
    pivoted(&mut suite, "the_machine_becomes_its_node_image", &bed.guest, bed.before.as_ref(), &bed.expected);
    ignition::pivoted(&mut suite, "the_machine_becomes_its_node_image", &bed.guest);
    suite.run_after("the_machine_becomes_its_node_image", &mut bed, &scenarios![the_console_takes_a_login_afterwards]);
    let mut target = Target { images, live: Some(bed), disk, recording: Some(recording), installed: None };
    suite.run_after(
        "the_machine_becomes_its_node_image",
        &mut target,
        &scenarios![
            the_live_system_deploys_its_node_image_to_a_disk,
            no_byte_was_fetched_twice after the_live_system_deploys_its_node_image_to_a_disk,
            the_disk_boots_right_after_a_power_cut after the_live_system_deploys_its_node_image_to_a_disk,
            the_booted_deployment_is_the_node_image after the_disk_boots_right_after_a_power_cut,
            nothing_has_failed_on_the_disk after the_disk_boots_right_after_a_power_cut,
            a_power_cut_during_the_deployment_leaves_all_or_nothing after the_disk_boots_right_after_a_power_cut,
        ],
    );
    suite.finish()
}

/// A live machine with a disk, which boots this disk later.
struct Target<'a> {
    images: &'a Images,
    live: Option<Bed<'a>>,
    disk: PathBuf,
    recording: Option<Recording>,
    installed: Option<Vm>,
}

impl<'a> Target<'a> {
    fn live(&self) -> Result<&Bed<'a>> {
        self.live.as_ref().context("the live machine is off")
    }

    fn installed(&self) -> Result<&Vm> {
        self.installed.as_ref().context("the disk was not booted")
    }
}

/// Replaces the placeholders in commands of docs/single-node.md.
fn on_the_spare_disk(commands: &str) -> String {
    let place = commands.replace("DEVICE", "/dev/disk/by-id/virtio-spare").replace("/mnt", "/run/disk");
    place.replace("NAME", "testbed").replace("root=UUID=…", "node.deployed")
}

fn the_live_system_deploys_its_node_image_to_a_disk(target: &mut Target<'_>) -> Result<()> {
    let Commands { file_system, sysroot, deploy, .. } = page::commands();
    let prepare = on_the_spare_disk(&format!("set -e; mkdir /run/disk\n{file_system}\n{sysroot}\nsync"));
    target.live()?.guest.ask(&prepare)?;
    target.recording.as_mut().context("the writes are not recorded")?.begin()?;
    let guest = &target.live()?.guest;
    let done = guest.ask(&on_the_spare_disk(&deploy))?;
    println!("       {done}");
    contains(&done, "in the stateroot testbed boots commit")?;
    let origin = guest.ask("cat /run/disk/ostree/deploy/testbed/deploy/*.origin")?;
    contains(&origin, &format!("container-image-reference={FOLLOWED}"))
}

fn no_byte_was_fetched_twice(target: &mut Target<'_>) -> Result<()> {
    let Bed { registry, expected, .. } = target.live()?;
    let (served, size) = registry.served_layers(&target.images.storage, expected.image)?;
    println!("       {served} of {size} bytes were served");
    if served != size {
        bail!("{served} bytes were served of an image of {size}");
    }
    Ok(())
}

/// A successful deployment is durable. The disk's own kernel and initramfs boot it.
fn the_disk_boots_right_after_a_power_cut(target: &mut Target<'_>) -> Result<()> {
    let mut live = target.live.take().context("the live machine is off")?;
    live.registry.stop();
    live.guest.power_cut();
    target.installed = Some(Vm::boot_disk(target.images, "vm-a-installed", &target.disk, |_| Ok(()))?);
    Ok(())
}

fn the_booted_deployment_is_the_node_image(target: &mut Target<'_>) -> Result<()> {
    is_the_deployed_node_image(target.installed()?)
}

fn is_the_deployed_node_image(guest: &Vm) -> Result<()> {
    contains(&guest.ask("cat /usr/lib/os-release")?, "Debian GNU/Linux 13")?;
    contains(&guest.ask("cat /proc/cmdline")?, " node.deployed")?;
    contains(&guest.ask("ostree admin status")?, "* testbed ")?;
    guest.ask("oc version --client && test -e /usr/lib/modules/$(uname -r) && ! findmnt -n -t overlay /usr").map(drop)
}

/// Each power cut is followed by boots if the number of cuts is given.
fn a_power_cut_during_the_deployment_leaves_all_or_nothing(target: &mut Target<'_>) -> Result<()> {
    target.installed = None;
    let new = bootable(&target.disk)?;
    let registry = Registry::start(&target.images.storage, &work_dir("vm-a-cut-registry")?, None, None)?;
    let image = target.images.image("node-a")?.by_digest();
    let after = AfterCut { images: target.images, image, port: registry.port, new };
    target.recording.take().context("the writes are not recorded")?.replay(|cut, disk| after.check(cut, disk))
}

/// A disk after a power cut during the deployment from a live system.
struct AfterCut<'a> {
    images: &'a Images,
    image: String,
    port: u16,
    /// Commit of the new system.
    new: Vec<String>,
}

impl AfterCut<'_> {
    fn check(&self, cut: usize, disk: &Path) -> Result<()> {
        let found = bootable(disk)?;
        println!("       cut {cut}: boots {found:?}");
        match (found.is_empty(), found == self.new) {
            (false, false) => bail!("boots {found:?} instead of {:?}", self.new),
            _ if cuts::asked()?.is_none() => return Ok(()),
            (true, _) => self.a_live_system_deploys_again(cut, disk)?,
            _ => {}
        }
        let guest = Vm::boot_disk(self.images, &format!("vm-a-cut-{cut}"), disk, |_| Ok(()))?;
        is_the_deployed_node_image(&guest)?;
        contains(&guest.ask("ostree admin status")?, &format!("* testbed {}.", self.new.concat()))?;
        nothing_failed(&guest)
    }

    fn a_live_system_deploys_again(&self, cut: usize, disk: &Path) -> Result<()> {
        let name = format!("vm-a-cut-{cut}");
        let live = vm::Setup { spare: Some(disk), ..setup(&name, self.images) };
        let guest = Vm::start(self.images, &live, |files| {
            node_files(files, &self.image, vm::HOST, self.port)?;
            configured_later(files)
        })?;
        guest.wait_ssh(BOOT)?;
        guest.ask("mkdir /run/disk && mount /dev/disk/by-id/virtio-spare /run/disk")?;
        let deploy = on_the_spare_disk(&page::commands().deploy);
        let done = guest.ask(&format!("mv /etc/later /etc/node-image-pivot.conf.d && {deploy}"))?;
        contains(&done, "in the stateroot testbed boots commit")?;
        guest.power_cut();
        same(bootable(disk)?, self.new.clone())
    }
}

fn nothing_has_failed_on_the_disk(target: &mut Target<'_>) -> Result<()> {
    nothing_failed(target.installed()?)
}

fn ssh_answers(bed: &mut Bed<'_>) -> Result<()> {
    bed.guest.wait_ssh(BOOT)
}

fn the_base_system_runs(bed: &mut Bed<'_>) -> Result<()> {
    bed.before = Some(Before::of(&bed.guest)?);
    Ok(())
}

fn the_console_takes_a_login_while_the_registry_is_down(bed: &mut Bed<'_>) -> Result<()> {
    contains(&bed.guest.console_run("base-tool", Duration::from_secs(180))?, "base-tool 1.0")
}

fn a_new_ssh_login_works_while_the_registry_is_down(bed: &mut Bed<'_>) -> Result<()> {
    same(base_tool_of_a_login(&bed.guest)?, "base-tool 1.0".to_string())
}

fn the_pull_begins_by_itself_once_the_registry_is_back(bed: &mut Bed<'_>) -> Result<()> {
    bed.registry.resume()?;
    wait_for("the pull", Duration::from_secs(180), || {
        Ok(bed.guest.status()?["progress"]["bytes_fetched"].as_u64().unwrap_or(0) > 0)
    })
}

fn logins_work_during_the_pull(bed: &mut Bed<'_>) -> Result<()> {
    same(base_tool_of_a_login(&bed.guest)?, "base-tool 1.0".to_string())?;
    let state = bed.guest.unit("node-image-pull.service", "ActiveState")?;
    if state != "activating" {
        bail!("the pull was over ({state}) before the login: nothing shown");
    }
    contains(&bed.guest.console_run("base-tool", Duration::from_secs(180))?, "base-tool ")
}

fn the_machine_becomes_its_node_image(bed: &mut Bed<'_>) -> Result<()> {
    wait_pivoted(&bed.guest, PIVOT)
}

fn the_console_takes_a_login_afterwards(bed: &mut Bed<'_>) -> Result<()> {
    contains(&bed.guest.console_run("base-tool", Duration::from_secs(180))?, "base-tool 2.0")
}

/// Returns a bootimage without the agent, with a packed agent that follows the initramfs, as a PXE server delivers both.
/// The configuration names `image`. The kernel is older than that of the bootimage's initramfs.
fn stock_with_packed_agent(images: &Images, image: &str) -> Result<PathBuf> {
    let (stock, kernel, boot) = (images.stock()?, images.old_kernel()?, work_dir("vm-b-boot")?);
    symlink(kernel.join("vmlinuz"), boot.join("vmlinuz"))?;
    let packed = deliver::pack(&["initrd"], image, &boot)?;
    deliver::with_initramfs(&stock, &[stock.join("initramfs.img"), kernel.join("modules.img"), packed], &boot)?;
    Ok(boot)
}

/// The same release with packages newer, added and removed, as a plain image; by tag. Configured at first is an image that
/// needs another CPU. The bootimage does not have the agent: the initramfs carries it, with configuration and credentials.
#[test]
fn other_packages_of_the_same_release_replace_an_image_that_is_refused() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b-plain")?);
    let mut suite =
        Suite::new("machine: stock Debian 12 with a packed agent becomes node image b (plain, other packages)");
    let registry = Registry::start(&images.storage, &work_dir("vm-b-registry")?, None, None)?;
    let image = images.image("newer-cpu")?.by_digest();
    let boot = stock_with_packed_agent(images, &image)?;
    let guest =
        Vm::start(images, &vm::Setup { boot: &boot, medium: vm::Medium::Pxe, ..setup("vm-b", images) }, |files| {
            deliver::stock_files(files, registry.port)
        })?;
    let mut bed = Bed { guest, registry, expected, before: None };
    suite.run(
        &mut bed,
        &scenarios![
            ssh_answers,
            the_base_system_runs after ssh_answers,
            the_kernel_is_the_oldest_supported_one after ssh_answers,
            the_initramfs_carried_the_agent after ssh_answers,
            the_bus_accepts_the_name_of_a_carried_agent after the_initramfs_carried_the_agent,
            credentials_of_a_carried_agent_are_private after the_bus_accepts_the_name_of_a_carried_agent,
            an_image_for_a_newer_cpu_is_refused_with_the_reason after the_base_system_runs,
            a_refused_image_changes_nothing_and_the_machine_can_be_reached after the_base_system_runs,
            the_waiting_unit_is_started_again_with_another_image after the_base_system_runs,
            the_machine_becomes_its_node_image after the_base_system_runs,
        ],
    );
    pivoted(&mut suite, "the_machine_becomes_its_node_image", &bed.guest, bed.before.as_ref(), &bed.expected);
    suite.finish()
}

fn the_kernel_is_the_oldest_supported_one(bed: &mut Bed<'_>) -> Result<()> {
    contains(&bed.guest.ask("uname -r")?, "5.10.")
}

fn the_initramfs_carried_the_agent(bed: &mut Bed<'_>) -> Result<()> {
    bed.guest.ask("test ! -e /usr/bin/node-image-pivot && test -e /run/node-image-pivot/bin/node-image-pivot")?;
    contains(&bed.guest.console(), "node-image-pivot: carried the agent into the real root")
}

fn the_bus_accepts_the_name_of_a_carried_agent(bed: &mut Bed<'_>) -> Result<()> {
    let get = "busctl get-property org.nodeimage.Pivot1 /org/nodeimage/Pivot1 org.nodeimage.Pivot1 State";
    wait_for("the agent on the system bus", Duration::from_secs(180), || Ok(bed.guest.run(get)?.status == 0))
}

fn credentials_of_a_carried_agent_are_private(bed: &mut Bed<'_>) -> Result<()> {
    let loaded = "/run/credentials/node-image-pivotd.service/node-image-pivot.auth";
    same(bed.guest.ask(&format!("cat {loaded}"))?, "{\"auths\": {}}".into())?;
    let modes = bed.guest.ask("stat -c %a /run/credstore /run/credstore/node-image-pivot.auth")?;
    same(modes, "700\n600".to_owned())
}

fn an_image_for_a_newer_cpu_is_refused_with_the_reason(bed: &mut Bed<'_>) -> Result<()> {
    wait_for("the refusal", PIVOT, || Ok(bed.guest.unit("node-image-pull.service", "ActiveState")? == "failed"))?;
    let status = bed.guest.status()?;
    same(status["error"]["class"].as_str(), Some("refused"))?;
    let message = status["error"]["message"].as_str().unwrap_or_default();
    println!("       {message}");
    contains(message, "trial run of /usr/bin/true")?;
    contains(message, "built for a newer CPU than this machine's")
}

fn a_refused_image_changes_nothing_and_the_machine_can_be_reached(bed: &mut Bed<'_>) -> Result<()> {
    let guest = &bed.guest;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    same(guest.run("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?.text.trim().into(), "0".to_owned())?;
    guest.ask("/usr/bin/true; test ! -e /run/node-image-pivot/pivoted; test -e /etc/base-legacy.conf")?;
    same(base_tool_of_a_login(guest)?, "base-tool 1.0".to_string())
}

fn the_waiting_unit_is_started_again_with_another_image(bed: &mut Bed<'_>) -> Result<()> {
    let image = bed.expected.image.by_tag();
    bed.guest.ask(&format!(
        "mkdir -p /etc/node-image-pivot.conf.d
         echo 'image = \"{image}\"' >/etc/node-image-pivot.conf.d/50-testbed.toml
         systemctl start --no-block node-image-finish.service"
    ))?;
    wait_for("the next attempt", PIVOT, || Ok(bed.guest.status()?["state"] != "failed"))
}

/// A bootimage that already has the binaries of the cluster. Its CPU can run the image that `vm-b` refuses. It does not have
/// the agent: dracut added the agent's module to its initramfs.
#[test]
fn a_bootimage_with_the_binaries_is_left_alone_unless_forced() -> Result<()> {
    let images = Images::ensure()?;
    let mut suite =
        Suite::new("machine: a bootimage that has the binaries, and the agent's dracut module in its initramfs");
    let boot = work_dir("vm-binaries-boot")?;
    deliver::with_initramfs(&images.stock_binaries()?, &[images.initramfs()?], &boot)?;
    let setup = vm::Setup { boot: &boot, cpu: "max", kargs: &["audit=1"], ..setup("vm-binaries", images) };
    let expected = Expected::node_b(images.image("newer-cpu")?);
    let registry = Registry::start(&images.storage, &work_dir("vm-binaries-registry")?, None, None)?;
    let guest =
        Vm::start(images, &setup, |files| node_files(files, &expected.image.by_digest(), vm::HOST, registry.port))?;
    let mut bed = Bed { guest, registry, expected, before: None };
    suite.run(&mut bed, &scenarios![ssh_answers, the_initramfs_carried_the_agent after ssh_answers]);
    left_alone(&mut suite, &bed.guest);
    suite.run(
        &mut bed,
        &scenarios![
            the_audit_daemon_runs_with_its_rule after ssh_answers,
            mode_force_pivots_and_a_program_for_the_newer_cpu_runs after ssh_answers,
            the_audit_daemon_keeps_running_and_records_with_its_rule after the_audit_daemon_runs_with_its_rule,
        ],
    );
    suite.finish()
}

/// Identifies the process of the audit daemon, and lists the rules in the kernel.
const AUDIT: &str = "systemctl show -p MainPID -p InvocationID -p ActiveState auditd.service && auditctl -l";

fn the_audit_daemon_runs_with_its_rule(bed: &mut Bed<'_>) -> Result<()> {
    let state = bed.guest.ask(&format!("{{ {AUDIT}; }} | tee /run/audit-before"))?;
    contains(&state, "ActiveState=active")?;
    contains(&state, "-w /etc/testbed-audited -p wa -k testbed")
}

fn the_audit_daemon_keeps_running_and_records_with_its_rule(bed: &mut Bed<'_>) -> Result<()> {
    let (guest, records) = (&bed.guest, "grep -c 'key=\"testbed\"' /var/log/audit/audit.log");
    same(guest.ask(&format!("{{ {AUDIT}; }}"))?, guest.ask("cat /run/audit-before")?)?;
    let before: u32 = guest.run(records)?.text.trim().parse()?;
    guest.ask("touch /etc/testbed-audited")?;
    wait_for(
        "an audit record",
        Duration::from_secs(60),
        || Ok(guest.run(records)?.text.trim().parse::<u32>()? > before),
    )
}

fn mode_force_pivots_and_a_program_for_the_newer_cpu_runs(bed: &mut Bed<'_>) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("cp /usr/bin/true /run/before; echo 'mode = \"force\"' >/etc/node-image-pivot.conf.d/60-force.toml")?;
    guest.ask("node-image-pivot run")?;
    guest.ask("! cmp -s /usr/bin/true /run/before && /usr/bin/true").map(drop)
}
