//! The newest systemd, in the node image and in the bootimage, from a suite of Debian that changes each day: a change there
//! decides the result, too. On a real systemd in containers, and on a virtual machine. That suite's runc mounts an overlay
//! on `/usr`, which older releases do not.
//! `make check-newest`

use std::time::Duration;

use anyhow::{Context as _, Result};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Root, Setup};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::in_use::switched_in_use;
use testbed::overlays::{has_one_overlay, undoes};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, configured_later, configured_now, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::vm::{self, Vm};

type AnyGuest<'a> = &'a dyn Guest;

const PIVOTED: &str = "the_machine_becomes_its_node_image";

fn boot(images: &Pair, name: &str, root: Root, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Bed> {
    let network = Network::new()?;
    let work = work_dir(&format!("{name}-registry"))?;
    let registry = Registry::start(&images.storage, &work, Some(network.pid()), None)?;
    let setup = Setup { root, ..Setup::live(name, &images.boot) };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &images.image.by_digest(), "127.0.0.1", registry.port)?;
        fill(files)
    })?;
    Ok(Bed { guest, registry, network })
}

/// Returns the release of systemd in /usr, which must be newer than that of Debian 13.
fn newest_systemd(guest: &dyn Guest) -> Result<String> {
    let version = guest.ask("systemctl --version | cut -d ' ' -f 1,2 | head -n 1")?;
    let number: u32 = version.trim_start_matches("systemd ").parse().with_context(|| version.clone())?;
    same((number, number > 257), (number, true))?;
    Ok(version)
}

fn node_newest<'a>(images: &'a Pair, systemd: &'a str) -> Expected<'a> {
    Expected { systemd, os: "/sid", ..Expected::node_a(&images.image) }
}

#[test]
fn the_newest_release_is_pulled() -> Result<()> {
    let images = Pair::newest()?;
    let mut suite = Suite::new("container: Debian 12 becomes a node image of Debian's newest suite");
    let bed = boot(&images, "container-newest", Root::Plain, |_| Ok(()))?;
    becomes_the_node_image(&mut suite, &bed.guest, &images)?;
    let mut guest: AnyGuest<'_> = &bed.guest;
    suite.run_after(PIVOTED, &mut guest, &scenarios![an_undo_runs_the_booted_systemd]);
    suite.finish()
}

#[test]
fn the_newest_release_with_a_composefs_root_pivots() -> Result<()> {
    let images = Pair::newest_base()?;
    let mut suite = Suite::new("container: Debian's newest suite becomes a node image of that suite");
    let bed = boot(&images, "container-newest-base", Root::Composefs, |_| Ok(()))?;
    newest_systemd(&bed.guest)?;
    becomes_the_node_image(&mut suite, &bed.guest, &images)?;
    has_one_overlay(&mut suite, PIVOTED, &bed.guest);
    let mut guest: AnyGuest<'_> = &bed.guest;
    suite.run_after(PIVOTED, &mut guest, &scenarios![runc_seals_its_program_with_an_overlay]);
    undoes(&mut suite, PIVOTED, &bed.guest);
    suite.finish()
}

/// The kernel and the initramfs are of that suite, too.
#[test]
fn a_machine_of_the_newest_release_pivots() -> Result<()> {
    let images = Pair::newest_base()?;
    let mut suite = Suite::new("machine: Debian's newest suite becomes a node image of that suite");
    let registry = Registry::start(&images.storage, &work_dir("vm-newest-registry")?, None, None)?;
    let guest = Vm::start(&images, &vm::Setup::live("vm-newest", &images.boot), |files| {
        node_files(files, &images.image.by_digest(), vm::HOST, registry.port)
    })?;
    guest.wait_ssh(Duration::from_secs(600))?;
    newest_systemd(&guest)?;
    becomes_the_node_image(&mut suite, &guest, &images)?;
    suite.finish()
}

#[test]
fn the_newest_release_is_switched_in_use() -> Result<()> {
    let images = Pair::newest_base()?;
    let mut suite = Suite::new("container: Debian's newest suite in the flow of the assisted installer");
    let bed = boot(&images, "container-newest-assisted", Root::Plain, configured_later)?;
    let mut guest: AnyGuest<'_> = &bed.guest;
    suite.run(&mut guest, &scenarios![the_base_system_runs, the_image_is_configured after the_base_system_runs]);
    let before = Before::of(guest)?;
    let systemd = newest_systemd(guest)?;
    let expected = node_newest(&images, &systemd);
    switched_in_use(&mut suite, "the_image_is_configured", guest, Some(&before), &expected);
    suite.finish()
}

/// Waits until the guest is its node image, and checks it.
fn becomes_the_node_image(suite: &mut Suite, mut guest: &dyn Guest, images: &Pair) -> Result<()> {
    let before = Before::of(guest)?;
    suite.run(&mut guest, &scenarios![the_machine_becomes_its_node_image]);
    if !suite.passed(PIVOTED) {
        return Ok(());
    }
    let systemd = newest_systemd(guest)?;
    pivoted(suite, PIVOTED, guest, Some(&before), &node_newest(images, &systemd));
    Ok(())
}

fn the_base_system_runs(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.wait_unit("multi-user.target", "active", Duration::from_secs(180))
}

fn the_image_is_configured(guest: &mut AnyGuest<'_>) -> Result<()> {
    configured_now(*guest)
}

fn the_machine_becomes_its_node_image(guest: &mut AnyGuest<'_>) -> Result<()> {
    wait_pivoted(*guest, Duration::from_secs(900))
}

/// The agent that undoes has the libraries of the newest suite.
fn an_undo_runs_the_booted_systemd(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.ask("systemctl restart node-image-pivotd.service && node-image-pivot undo")?;
    same(guest.ask("base-tool && ! command -v oc")?, "base-tool 1.0".into())?;
    contains(&guest.ask("systemctl show --property=Version --value")?, "252")?;
    nothing_failed(*guest)
}

/// A created container runs the program of runc until it is started. From release 1.2 on, that is a file of a detached
/// overlay on the directory of /usr, or a copy in memory if the kernel accepts no overlay there.
fn runc_seals_its_program_with_an_overlay(guest: &mut AnyGuest<'_>) -> Result<()> {
    let spec = "jq '.process.terminal = false | .process.args = [\"/oc\"]' spec.json >config.json";
    guest.ask("mkdir -p /run/sealed/rootfs && cp /usr/bin/oc /run/sealed/rootfs")?;
    guest.ask(&format!("cd /run/sealed && runc spec && mv config.json spec.json && {spec}"))?;
    let create = "runc --debug --log /run/sealed/log create sealed";
    guest.ask(&format!("systemd-run --quiet --wait --working-directory=/run/sealed {create}"))?;
    let sealed =
        "readlink /proc/$(runc state sealed | jq .pid)/exe; grep -o 'using overlayfs for sealed' /run/sealed/log";
    let sealed = guest.ask(sealed);
    guest.ask("runc delete --force sealed && rm -r /run/sealed")?;
    same(sealed?, "/runc\nusing overlayfs for sealed".into())
}
