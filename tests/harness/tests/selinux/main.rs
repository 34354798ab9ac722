//! SELinux is enforcing throughout, and the node image is the next release of all packages, with its own policy: another
//! version of the format, types that the bootimage's policy lacks, and one type less. On virtual machines.
//! `make check-one NAME=selinux`

mod machine;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::disk;
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{unit_is, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::table::Flow;
use testbed::vm::Vm;

use machine::{Boot, DROP_IN, Installed, Machine};

const PIVOT: Duration = Duration::from_secs(600);
/// Contexts that only one of the policies has.
const OF_NODE_IMAGE: &str = "system_u:object_r:nodeapp_exec_t:s0";
const OF_BOOTIMAGE: &str = "system_u:object_r:base_legacy_exec_t:s0";

/// Asks the kernel if the loaded policy has a context.
fn knows(guest: &Vm, context: &str) -> Result<bool> {
    Ok(guest.run(&format!("printf %s {context} >/sys/fs/selinux/context"))?.status == 0)
}

/// Returns the label of a path, without its level.
fn label(guest: &Vm, path: &str) -> Result<String> {
    guest.ask(&format!("stat -c %C {path} | cut -d: -f1-3"))
}

/// Returns the denials of this boot, one on each line.
fn denials(guest: &Vm) -> Result<String> {
    guest.ask("journalctl -b -o cat | grep -a 'avc: *denied' || true")
}

/// Counts denials by domain, program, permission and target.
fn counted(denials: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in denials.lines() {
        let after = |start: &str, end: char| {
            line.split_once(start).and_then(|(_, rest)| rest.split(end).next()).unwrap_or_default().trim()
        };
        let kind = |of: &str| after(of, ' ').split(':').nth(2).unwrap_or_default();
        let permissions = after("denied  {", '}');
        let who = format!("{} ({})", kind("scontext="), after("comm=", ' ').trim_matches('"'));
        let what = format!("{who}: {permissions} on {} of {}", after("tclass=", ' '), kind("tcontext="));
        *counts.entry(what).or_default() += 1;
    }
    counts
}

/// Returns the domains of a service's processes, each once.
fn domains(guest: &Vm, unit: &str) -> Result<String> {
    let group = guest.unit(unit, "ControlGroup")?;
    let processes = format!("find /sys/fs/cgroup{group} -name cgroup.procs -exec cat {{}} +");
    guest.ask(&format!(
        "{processes} | xargs -I{{}} cat /proc/{{}}/attr/current | tr '\\0' '\\n' | cut -d: -f3 | sort -u"
    ))
}

#[test]
fn an_enforcing_live_system_gets_types_that_only_the_node_image_has() -> Result<()> {
    let mut suite = Suite::new("machine: SELinux enforcing, the node image is the next release with its own policy");
    let images = Pair::selinux_stock()?;
    let registry = Registry::start(&images.storage, &work_dir("vm-selinux-registry")?, None, None)?;
    let mut machine = Machine { images, registry, installed: None, boot: Boot::First, on: None };
    suite.run(
        &mut machine,
        &scenarios![
            the_live_system_boots,
            each_policy_has_types_that_the_other_lacks after the_live_system_boots,
            the_agent_in_another_domain_refuses_the_switch_and_names_the_domain after the_live_system_boots,
            the_agent_in_its_own_domain_becomes_the_node_image after the_live_system_boots,
        ],
    );
    let pivoted = "the_agent_in_its_own_domain_becomes_the_node_image";
    labelled_and_running(&mut suite, pivoted, &mut machine);
    undone(&mut suite, pivoted, &mut machine);
    suite.run_after(pivoted, &mut machine, &scenarios![undo_starts_the_removed_service_in_its_domain]);
    enforced(&mut suite, "the_live_system_boots", &mut machine);
    suite.finish()
}

/// Labels, policy and /etc of an installed system outlive the pivot.
#[test]
fn an_enforcing_installed_system_boots_again() -> Result<()> {
    let mut suite = Suite::new("machine: installed to a disk, SELinux enforcing, the next release, and reboots");
    let images = Pair::selinux()?;
    let (boot, work) = (Pair::selinux_disk()?, work_dir("vm-selinux-disk-image")?);
    let registry = Registry::start(&images.storage, &work_dir("vm-selinux-disk-registry")?, None, None)?;
    let disk = disk::copy(&boot, &work)?;
    let deployment = std::fs::read_to_string(boot.join("kargs"))?;
    let installed = Some(Installed { boot, disk, deployment });
    let mut machine = Machine { images, registry, installed, boot: Boot::First, on: None };
    first_boot(&mut suite, &mut machine);
    second_boot(&mut suite, &mut machine);
    third_boot(&mut suite, &mut machine);
    suite.finish()
}

const BECOMES: &str = "the_machine_becomes_its_node_image";

fn first_boot(suite: &mut Suite, machine: &mut Machine) {
    suite.part("first boot");
    let boot = scenarios![
        the_installed_system_boots,
        the_machine_becomes_its_node_image after the_installed_system_boots,
    ];
    suite.run(machine, &boot);
    labelled_and_running(suite, BECOMES, machine);
    enforced(suite, BECOMES, machine);
    suite.run_after(BECOMES, machine, &scenarios![the_image_is_stored_in_the_repo_of_the_system, a_power_cut_comes]);
}

fn second_boot(suite: &mut Suite, machine: &mut Machine) {
    suite.part("second boot");
    machine.boot = Boot::Second;
    let boot = scenarios![
        the_pivoted_system_boots_again after a_power_cut_comes,
        the_machine_becomes_its_node_image after the_pivoted_system_boots_again,
    ];
    suite.run(machine, &boot);
    labelled_and_running(suite, BECOMES, machine);
    undone(suite, BECOMES, machine);
    enforced(suite, BECOMES, machine);
    suite.run_after(BECOMES, machine, &scenarios![a_power_cut_comes]);
}

fn third_boot(suite: &mut Suite, machine: &mut Machine) {
    suite.part("third boot");
    let boot = scenarios![
        the_undone_system_boots_again after a_power_cut_comes,
        the_old_policy_is_enforced_and_nothing_has_failed after the_undone_system_boots_again,
    ];
    suite.run(machine, &boot);
    enforced(suite, "the_undone_system_boots_again", machine);
}

fn the_live_system_boots(machine: &mut Machine) -> Result<()> {
    machine.boot_live()
}

fn the_installed_system_boots(machine: &mut Machine) -> Result<()> {
    machine.boot_disk("vm-selinux-disk", "")
}

fn the_pivoted_system_boots_again(machine: &mut Machine) -> Result<()> {
    machine.boot_disk("vm-selinux-disk-again", "")
}

fn the_undone_system_boots_again(machine: &mut Machine) -> Result<()> {
    machine.boot_disk("vm-selinux-disk-undone", "node-image-pivot=off")
}

fn a_power_cut_comes(machine: &mut Machine) -> Result<()> {
    machine.power_cut()
}

fn each_policy_has_types_that_the_other_lacks(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("getenforce")?, "Enforcing".into())?;
    guest.ask("systemctl start base-legacy.service")?;
    same(domains(guest, "base-legacy.service")?, "base_legacy_t".into())?;
    same(knows(guest, OF_NODE_IMAGE)?, false)?;
    same(knows(guest, "system_u:object_r:etc_t:s0")?, true)
}

fn the_agent_in_another_domain_refuses_the_switch_and_names_the_domain(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    wait_for("the refusal", Duration::from_secs(180), || Ok(guest.status()?["state"] == "failed"))?;
    let status = guest.status()?;
    let said = status["error"]["message"].as_str().unwrap_or_default().to_owned();
    for words in ["domain initrc_t", "mac_admin", "install_exec_t", "docs/selinux.md"] {
        contains(&said, words)?;
    }
    let label = said.split_whitespace().find(|word| word.contains(":object_r:")).unwrap_or_default();
    same((label.is_empty(), knows(guest, label.trim_end_matches(':'))?), (false, false))?;
    contains(&guest.run("systemctl status --no-pager -l node-image-pull.service")?.text, "domain initrc_t")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}

fn the_agent_in_its_own_domain_becomes_the_node_image(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask(&format!("rm {DROP_IN} && systemctl daemon-reload && systemctl restart node-image-pivotd.service"))?;
    guest.ask("systemctl start --no-block node-image-finish.service")?;
    wait_for("another attempt", Duration::from_secs(180), || Ok(guest.status()?["state"] != "failed"))?;
    wait_pivoted(guest, PIVOT)
}

fn the_machine_becomes_its_node_image(machine: &mut Machine) -> Result<()> {
    wait_pivoted(machine.guest()?, PIVOT)
}

fn the_image_is_stored_in_the_repo_of_the_system(machine: &mut Machine) -> Result<()> {
    same(machine.guest()?.status()?["cost"]["ram_store_bytes"].as_u64(), Some(0))
}

fn the_old_policy_is_enforced_and_nothing_has_failed(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("getenforce")?, "Enforcing".into())?;
    same(knows(guest, OF_NODE_IMAGE)?, false)?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    labelled_by_the_old_policy(guest)?;
    nothing_failed(guest)
}

/// Runs the scenarios about labels, domains and services after a pivot.
fn labelled_and_running(suite: &mut Suite, earlier: &str, machine: &mut Machine) {
    if let Ok(guest) = machine.guest() {
        suite.covers(guest, Flow::Bootstrap, "labelled_and_running");
    }
    suite.run_after(
        earlier,
        machine,
        &scenarios![
            the_policy_of_the_node_image_is_loaded_though_it_is_newer_than_the_kernel,
            files_have_types_that_only_the_node_image_has,
            written_and_kept_files_have_the_labels_of_the_new_policy,
            a_service_runs_in_a_domain_that_only_the_node_image_has,
            systemd_and_restarted_services_run_in_their_domains_of_the_new_policy,
            no_process_stays_in_a_removed_domain,
            no_unit_has_failed,
            a_new_ssh_login_works,
            the_user_manager_of_that_login_runs,
        ],
    );
}

/// The old policy stays on the disk for the next boot of the old system.
fn the_policy_of_the_node_image_is_loaded_though_it_is_newer_than_the_kernel(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    let kernel: u32 = guest.ask("cat /sys/fs/selinux/policyvers")?.parse()?;
    same(guest.ask("ls /etc/selinux/default/policy")?, format!("policy.{kernel}\npolicy.{}", kernel + 1))?;
    same(knows(guest, OF_NODE_IMAGE)?, true)?;
    same(knows(guest, OF_BOOTIMAGE)?, false)?;
    contains(&guest.status()?["notes"].to_string(), "the SELinux policy in /etc/selinux differs and was loaded")
}

fn files_have_types_that_only_the_node_image_has(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    for (path, kind) in [
        ("/usr/bin/nodeapp", "nodeapp_exec_t"),
        ("/usr/lib/nodeapp/data", "nodeapp_conf_t"),
        ("/etc/nodeapp", "nodeapp_conf_t"),
        ("/etc/nodeapp/nodeapp.conf", "nodeapp_conf_t"),
        ("/etc/containerd", "container_config_t"),
        ("/usr/bin/kubelet", "kubelet_exec_t"),
        ("/usr/bin/oc", "bin_t"),
        ("/etc/base-tool/new-default.conf", "etc_t"),
    ] {
        same(format!("{path} {}", label(guest, path)?), format!("{path} system_u:object_r:{kind}"))?;
    }
    Ok(())
}

fn written_and_kept_files_have_the_labels_of_the_new_policy(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    let written = "/usr/bin /usr/lib/systemd /usr/lib/openssh /usr/lib/nodeapp /usr/lib/base-tool";
    same(guest.ask(&format!("restorecon -nvr {written}"))?, String::new())?;
    // On the second boot udev could not give this device its label, and gave it another special one; docs/selinux.md.
    let (but, of_device) = match machine.boot {
        Boot::First => ("", ":userfaultfd_device_t"),
        Boot::Second => ("/dev/userfaultfd", ":event_device_t"),
    };
    same(mislabelled(guest, but)?, String::new())?;
    // The merge writes neither: one is a device, and the other has the same content in both trees.
    contains(&label(guest, "/dev/userfaultfd")?, of_device)?;
    contains(&label(guest, "/etc/containers/policy.json")?, ":container_config_t")
}

/// Returns what `restorecon` would label in these directories, except the path `but`, and a carried agent, whose label is
/// from its unit.
fn mislabelled(guest: &Vm, but: &str) -> Result<String> {
    let labelled_by_its_unit = "/run/node-image-pivot/bin/node-image-pivot";
    let but = [labelled_by_its_unit, but].map(|path| format!("-e ' {path} '")).join(" ");
    guest.ask(&format!(
        "would=$(restorecon -nvrx /dev /etc /run) && printf %s \"$would\" | grep -Fv {but} || [ $? = 1 ]"
    ))
}

fn a_service_runs_in_a_domain_that_only_the_node_image_has(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    guest.wait_unit("nodeapp.service", "active", Duration::from_secs(180))?;
    same(domains(guest, "nodeapp.service")?, "nodeapp_t".into())?;
    let journal = guest.ask("journalctl -b -o cat -u nodeapp.service")?;
    // systemd's own messages may stand between the two lines of the service.
    ["nodeapp's data", "nodeapp=yes"].into_iter().try_for_each(|line| contains(&journal, line))
}

fn systemd_and_restarted_services_run_in_their_domains_of_the_new_policy(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    for (unit, domain) in [
        ("init.scope", "init_t"),
        ("node-image-pivotd.service", "install_t"),
        ("ssh.service", "sshd_t"),
        ("systemd-journald.service", "syslogd_t"),
        ("systemd-logind.service", "systemd_logind_t"),
        ("systemd-networkd.service", "systemd_networkd_t"),
        ("systemd-resolved.service", "systemd_resolved_t"),
        ("systemd-udevd.service", "udev_t"),
    ] {
        same(format!("{unit} {}", domains(guest, unit)?), format!("{unit} {domain}"))?;
    }
    contains(&guest.ask("systemctl --version")?, "systemd 257")?;
    same(guest.ask("systemctl show --property=Version --value | cut -d. -f 1")?, "257".into())
}

fn no_process_stays_in_a_removed_domain(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("ps -eo label=,comm= | grep -e unlabeled_t -e base_legacy_t || true")?, String::new())?;
    unit_is(guest, "base-legacy.service", "inactive")
}

fn no_unit_has_failed(machine: &mut Machine) -> Result<()> {
    nothing_failed(machine.guest()?)
}

fn a_new_ssh_login_works(machine: &mut Machine) -> Result<()> {
    same(machine.guest()?.login("base-tool")?.text.trim(), "base-tool 2.0")
}

fn the_user_manager_of_that_login_runs(machine: &mut Machine) -> Result<()> {
    same(machine.guest()?.login("systemctl is-active user@0.service")?.text.trim(), "active")
}

/// Runs the scenarios about an undo.
fn undone(suite: &mut Suite, earlier: &str, machine: &mut Machine) {
    let list = scenarios![undo_loads_the_old_policy, undo_restarts_services_of_the_old_release_in_their_domains];
    suite.run_after(earlier, machine, &list);
}

fn undo_loads_the_old_policy(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    guest.ask("node-image-pivot undo")?;
    same(knows(guest, OF_NODE_IMAGE)?, false)?;
    same(knows(guest, OF_BOOTIMAGE)?, true)?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    match machine.boot {
        Boot::First => same(mislabelled(guest, "")?, String::new())?,
        // The file contexts in /etc stay those of the node image: this boot's merge found them there.
        Boot::Second => labelled_by_the_old_policy(guest)?,
    }
    same(guest.login("base-tool")?.text.trim(), "base-tool 1.0")
}

fn undo_restarts_services_of_the_old_release_in_their_domains(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("systemctl show --property=Version --value | cut -d. -f 1")?, "252".into())?;
    same(guest.ask("ps -eo label=,comm= | grep unlabeled_t || true")?, String::new())?;
    nothing_failed(guest)
}

fn undo_starts_the_removed_service_in_its_domain(machine: &mut Machine) -> Result<()> {
    same(domains(machine.guest()?, "base-legacy.service")?, "base_legacy_t".into())
}

/// Checks that no entry of /etc has a label that the loaded, old policy lacks.
fn labelled_by_the_old_policy(guest: &Vm) -> Result<()> {
    same(guest.ask("find /etc -xdev -context '*:unlabeled_t:*'")?, String::new())
}

/// Runs the scenarios about the time since the boot, and prints the denials.
fn enforced(suite: &mut Suite, earlier: &str, machine: &mut Machine) {
    let list = scenarios![selinux_was_enforcing_since_the_boot, the_agent_in_its_own_domain_was_denied_nothing];
    suite.run_after(earlier, machine, &list);
    let all = machine.guest().and_then(denials).unwrap_or_default();
    for (denied, times) in counted(&all) {
        println!("       denied {times} times: {denied}");
    }
}

/// The kernel logs 1404 whenever the mode changes.
fn selinux_was_enforcing_since_the_boot(machine: &mut Machine) -> Result<()> {
    let guest = machine.guest()?;
    same(guest.ask("getenforce")?, "Enforcing".into())?;
    same(guest.ask("journalctl -b -o cat | grep -ac 'type=1404\\|MAC_STATUS' || true")?, "0".into())
}

fn the_agent_in_its_own_domain_was_denied_nothing(machine: &mut Machine) -> Result<()> {
    let all = denials(machine.guest()?)?;
    let of_agent: Vec<_> = all.lines().filter(|line| line.contains(":install_t:")).collect();
    if !of_agent.is_empty() {
        bail!("{}", of_agent.join("\n"));
    }
    Ok(())
}
