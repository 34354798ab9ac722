//! Pivots on a real systemd as PID 1 in a container: all but the kernel, in seconds instead of minutes.
//! `make check-one NAME=container`

use std::time::Duration;

use anyhow::Result;
use testbed::check::{contains, same};
use testbed::container::{Bed, Container, Network, Root, Serving, Setup};
use testbed::disk;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::in_use::switched_in_use;
use testbed::overlays::{has_one_overlay, takes_another_overlay, undoes};
use testbed::registry::{Registry, auth_file};
use testbed::scenario::{
    Before, Expected, configured_later, configured_now, node_files, pivoted, unit_is, wait_pivoted,
};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::{left_alone, waits_and_says_why};

const PIVOT: Duration = Duration::from_secs(400);
const PIVOTED: &str = "the_machine_becomes_its_node_image";
const UNDONE: &str = "an_undo_shows_the_booted_usr";

/// Directory of the agent in the repo of an installed system.
const EXTENSION: &str = "/sysroot/ostree/repo/extensions/node-image-pivot";

/// The root is so deep that the kernel accepts no overlay on `/usr`. The node store is on the disk.
#[test]
fn the_next_release_is_pulled_once_the_registry_is_back() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected { usr: "xfs", ..Expected::node_a(images.image("node-a")?) };
    let mut suite = Suite::new("container: Debian 12 becomes node image a (Debian 13), the registry comes late");
    let network = Network::new()?;
    let mut registry = Registry::start(&images.storage, &work_dir("container-a-registry")?, Some(network.pid()), None)?;
    registry.stop();
    let installed = images.disk()?;
    let disk = disk::copy(&installed, &work_dir("container-a-disk")?)?;
    let setup = Setup { root: Root::Stacked, ..Setup::installed("container-a", &installed, &disk) };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &expected.image.by_digest(), "127.0.0.1", registry.port)
    })?;
    let mut bed = Bed { guest, registry, network };
    let before = Before::of(&bed.guest)?;
    waits_and_says_why(&mut suite, None, &bed.guest);
    suite.run(&mut bed, &scenarios![a_new_ssh_login_works_while_the_registry_is_down]);
    bed.registry.resume()?;
    suite.run(&mut bed, &scenarios![the_machine_becomes_its_node_image]);
    pivoted(&mut suite, PIVOTED, &bed.guest, Some(&before), &expected);
    let bound =
        scenarios![the_cost_of_a_complete_tree_was_stated_before_the_pull, the_new_usr_is_a_complete_tree_of_links,];
    suite.run_after(PIVOTED, &mut bed, &bound);
    takes_another_overlay(&mut suite, PIVOTED, &bed.guest);
    undoes(&mut suite, PIVOTED, &bed.guest);
    let undone = scenarios![an_undo_removes_the_complete_tree, a_complete_tree_is_built_again_after_an_undo];
    suite.run_after(UNDONE, &mut bed, &undone);
    suite.part("second boot");
    let Bed { guest, registry, network } = bed;
    drop(guest);
    let guest = Container::start(images, &network, &Setup { name: "container-a-again", ..setup }, |_| Ok(()))?;
    let mut bed = Bed { guest, registry, network };
    let again = scenarios![
        the_machine_becomes_its_node_image,
        no_object_is_stored_again after the_machine_becomes_its_node_image,
        the_new_usr_is_a_complete_tree_of_links after the_machine_becomes_its_node_image,
    ];
    suite.run(&mut bed, &again);
    undoes(&mut suite, PIVOTED, &bed.guest);
    suite.run_after(UNDONE, &mut bed, &scenarios![an_undo_removes_the_complete_tree]);
    suite.finish()
}

fn the_cost_of_a_complete_tree_was_stated_before_the_pull(bed: &mut Bed) -> Result<()> {
    let lines =
        bed.guest.ask("journalctl -u node-image-pivotd.service -o cat | grep -m 2 'needs at most\\|cannot fetch'")?;
    contains(
        lines.lines().next().unwrap_or_default(),
        "a complete tree of the node image: a node store in RAM needs at most",
    )
}

fn the_new_usr_is_a_complete_tree_of_links(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let plan: serde_json::Value = serde_json::from_str(&guest.ask("cat /run/node-image-pivot/plan.json")?)?;
    same(plan["base"].clone(), serde_json::json!({"bound": "/usr"}))?;
    contains(&plan["warnings"].to_string(), "accepts no overlay")?;
    let status = guest.ask("node-image-pivot status --json")?;
    contains(&status, "a complete tree, bound over /usr")?;
    same(guest.ask("findmnt -n -o FSTYPE,OPTIONS --mountpoint /usr")?.starts_with("xfs ro,nodev,"), true)?;
    guest.ask("findmnt --mountpoint /usr/lib/modules")?;
    // The object, the entry of the delta tree and that of the complete tree. The agent itself is a copy.
    same(guest.ask("stat -c %h /usr/bin/oc")?, "3".into())?;
    let own: u64 =
        guest.ask(&format!("du -sm /sysroot/ostree/repo/objects {EXTENSION} | tail -n 1 | cut -f 1"))?.parse()?;
    same((own, own < 100), (own, true))?;
    let id = guest.ask("cat /proc/sys/kernel/random/boot_id")?;
    same(guest.ask(&format!("cd {EXTENSION} && echo boot-*/node-image"))?, format!("boot-{id}/node-image"))
}

fn an_undo_removes_the_complete_tree(bed: &mut Bed) -> Result<()> {
    bed.guest.ask(&format!("! ls -d {EXTENSION}/boot-*/node-image")).map(drop)
}

/// The container ends with this tree as its /usr.
fn a_complete_tree_is_built_again_after_an_undo(bed: &mut Bed) -> Result<()> {
    bed.guest.ask("node-image-pivot overlay && kubectl version --client")?;
    the_new_usr_is_a_complete_tree_of_links(bed)
}

fn no_object_is_stored_again(bed: &mut Bed) -> Result<()> {
    let status = bed.guest.status()?;
    same(status["progress"]["objects_done"].as_u64().unwrap_or(0), 0)?;
    same(status["cost"]["ram_store_bytes"].as_u64(), Some(0))
}

fn a_new_ssh_login_works_while_the_registry_is_down(bed: &mut Bed) -> Result<()> {
    same(bed.guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
}

fn the_machine_becomes_its_node_image(bed: &mut Bed) -> Result<()> {
    wait_pivoted(&bed.guest, PIVOT)
}

/// The password of the registry, and the content of a file in /etc that only root can read.
const SECRETS: [&str; 2] = ["only-for-the-registry", "edited by the administrator"];

/// The registry asks for a login, which is in the auth file that the contract names. The root is a composefs root.
#[test]
fn other_packages_are_pulled_with_a_login_on_a_composefs_root() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b")?);
    let mut suite = Suite::new("container: Debian 12 becomes node image b, from a registry that asks for a login");
    let network = Network::new()?;
    let [password, content] = SECRETS;
    let login = Some(("core", password));
    let registry = Registry::start(&images.storage, &work_dir("container-b-registry")?, Some(network.pid()), login)?;
    let setup = Setup { root: Root::Composefs, ..Setup::live("container-b", &images.boot) };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &expected.image.by_tag(), "127.0.0.1", registry.port)?;
        let auth = auth_file(&format!("127.0.0.1:{}", registry.port), "core", password);
        // The node image has another version, so the merge reports a conflict.
        files.put("/etc/base-tool/admin-edited.conf", 0o600, &format!("{content}\n"))?;
        files.put("/var/roothome/.docker/config.json", 0o600, &auth)
    })?;
    let mut bed = Bed { guest, registry, network };
    let before = Before::of(&bed.guest)?;
    suite.run(&mut bed, &scenarios![the_machine_becomes_its_node_image]);
    pivoted(&mut suite, PIVOTED, &bed.guest, Some(&before), &expected);
    suite.run(&mut bed, &scenarios![secrets_are_not_visible after the_machine_becomes_its_node_image]);
    has_one_overlay(&mut suite, PIVOTED, &bed.guest);
    undoes(&mut suite, PIVOTED, &bed.guest);
    suite.finish()
}

/// The words are in files that only root can read. Neither they nor the encoded login may appear elsewhere.
fn secrets_are_not_visible(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let [password, content] = SECRETS;
    guest.ask(&format!(
        "umask 077; printf '%s\\n' {password} '{content}' $(printf core:{password} | base64) >/run/words; \
         grep -qFf /run/words /root/.docker/config.json && grep -qFf /run/words /etc/base-tool/admin-edited.conf"
    ))?;
    for source in [
        "journalctl --all -o json",
        "node-image-pivot status --json",
        "node-image-pivot report --json",
        "node-image-pivot plan --json",
        "node-image-pivot gather --output - | tar -xzO",
        "find /run /etc /var -type f -perm -o=r -exec cat {} +",
        "cat /proc/[0-9]*/cmdline",
    ] {
        guest.ask(&format!("({source}) 2>/dev/null | grep -qa ."))?;
        let found = guest.run(&format!("({source}) 2>/dev/null | grep -aFf /run/words"))?;
        same((source, found.text.as_str()), (source, ""))?;
    }
    guest.ask("rm /run/words").map(drop)
}

/// Boots a container that has an image configured and no registry.
fn without_a_registry(setup: &Setup<'_>, images: &Images, network: &Network) -> Result<Container> {
    let image = images.image("node-a")?.by_digest();
    Container::start(images, network, setup, |files: &Files| node_files(files, &image, "127.0.0.1", 1))
}

#[test]
fn a_bootimage_with_the_binaries_is_left_alone() -> Result<()> {
    let images = Images::ensure()?;
    let mut suite = Suite::new("container: a bootimage that has the binaries");
    let network = Network::new()?;
    let mut setup = Setup::live("container-binaries", &images.boot);
    setup.boot = &images.boot_binaries;
    let guest = without_a_registry(&setup, images, &network)?;
    left_alone(&mut suite, &guest);
    suite.finish()
}

#[test]
fn a_system_is_left_alone_when_the_kernel_command_line_switches_the_pivot_off() -> Result<()> {
    let images = Images::ensure()?;
    let mut suite = Suite::new("container: node-image-pivot=off");
    let network = Network::new()?;
    let mut setup = Setup::live("container-off", &images.boot);
    setup.kargs = &["node-image-pivot=off"];
    let guest = without_a_registry(&setup, images, &network)?;
    left_alone(&mut suite, &guest);
    suite.finish()
}

/// A unit on the kernel command line is where the administrator wants the boot to end: the agent stays out of the way.
#[test]
fn a_target_on_the_kernel_command_line_is_reached_without_a_pivot() -> Result<()> {
    let images = Images::ensure()?;
    for (word, target) in [("systemd.unit=rescue.target", "rescue.target"), ("emergency", "emergency.target")] {
        let mut suite = Suite::new(&format!("container: {word} on the kernel command line"));
        let network = Network::new()?;
        let mut setup = Setup::live("container-told", &images.boot);
        let kargs = [word];
        setup.kargs = &kargs;
        let mut guest = without_a_registry(&setup, images, &network)?;
        suite.each("the_target_is_reached", None, &mut guest, [(target, target)], |guest, target| {
            guest.wait_unit(target, "active", Duration::from_secs(180))
        });
        suite.run(&mut guest, &scenarios![no_unit_of_the_pivot_ran]);
        suite.finish()?;
    }
    Ok(())
}

fn no_unit_of_the_pivot_ran(guest: &mut Container) -> Result<()> {
    for unit in ["node-image-pivot.target", "node-image-pull.service", "node-image-pivotd.service"] {
        unit_is(guest, unit, "inactive")?;
    }
    guest.ask("test ! -e /run/systemd/generator.early/default.target").map(drop)
}

/// The flow of the assisted installer starts units on a system that is up: no isolate, and no service stops.
#[test]
fn units_that_an_installer_starts_isolate_nothing() -> Result<()> {
    let images = Images::ensure()?;
    let mut suite = Suite::new("container: the flow of the assisted installer");
    let mut bed = Bed::boot("container-assisted", "node-a", Serving::AtBoot, configured_later)?;
    suite.run(&mut bed, &scenarios![the_base_system_runs, the_image_is_configured after the_base_system_runs]);
    let before = Before::of(&bed.guest)?;
    let refusals = scenarios![
        a_configuration_that_the_new_sshd_rejects_refuses_the_switch,
        an_sshd_that_waits_for_its_host_keys_does_not_refuse_the_switch,
    ];
    suite.run_after("the_image_is_configured", &mut bed, &refusals);
    let expected = Expected::node_a(images.image("node-a")?);
    switched_in_use(&mut suite, "the_image_is_configured", &bed.guest, Some(&before), &expected);
    suite.finish()
}

fn the_base_system_runs(bed: &mut Bed) -> Result<()> {
    bed.guest.wait_unit("multi-user.target", "active", Duration::from_secs(180))
}

fn the_image_is_configured(bed: &mut Bed) -> Result<()> {
    configured_now(&bed.guest)
}

/// OpenSSH 10 has no DSA keys and rejects a configuration that names them; OpenSSH 9.2 accepts it.
fn a_configuration_that_the_new_sshd_rejects_refuses_the_switch(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    let dropped = "/etc/ssh/sshd_config.d/50-old-clients.conf";
    guest.ask(&format!("echo 'PubkeyAcceptedAlgorithms +ssh-dss' >{dropped} && cp -a /etc /run/etc-before"))?;
    let answer = guest.run("node-image-pivot plan")?;
    let changed = guest.ask(
        "diff -r --no-dereference /run/etc-before /etc 2>&1 | grep -v 'is a socket\\|is a fifo' || true; base-tool",
    );
    guest.ask(&format!("rm {dropped}"))?;
    for part in ["the running system is unchanged", dropped, "Bad key types '+ssh-dss'", "correct /etc/ssh"] {
        contains(&answer.text, part)?;
    }
    same(answer.status, 10)?;
    same(changed?, "base-tool 1.0".into())
}

fn an_sshd_that_waits_for_its_host_keys_does_not_refuse_the_switch(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("mkdir /run/keys && mv /etc/ssh/ssh_host_* /run/keys")?;
    let answer = guest.ask("node-image-pivot plan --json");
    guest.ask("mv /run/keys/* /etc/ssh")?;
    let plan: serde_json::Value = serde_json::from_str(&answer?)?;
    same(plan["state"].clone(), "staged".into())?;
    same(plan["plan"]["warnings"].to_string().contains("sshd"), false)
}
