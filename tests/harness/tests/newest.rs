//! The newest systemd, in the node image and in the bootimage, from a suite of Debian that changes each day: a change there
//! decides the result, too. On a real systemd in containers. That suite's runc mounts an overlay on `/usr`, which older
//! releases do not.
//! `make check-newest`

use std::time::Duration;

use anyhow::{Context as _, Result};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Root, Setup};
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::overlays::{has_one_overlay, undoes};
use testbed::registry::Registry;
use testbed::scenario::{
    Before, Expected, configured_later, configured_now, node_files, pivoted, switched_in_use, wait_pivoted,
};
use testbed::scenarios;
use testbed::suite::Suite;

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
    let mut bed = boot(&images, "container-newest", Root::Plain, |_| Ok(()))?;
    let before = Before::of(&bed.guest)?;
    suite.run(&mut bed, &scenarios![the_machine_becomes_its_node_image]);
    let systemd = newest_systemd(&bed.guest)?;
    pivoted(&mut suite, PIVOTED, &bed.guest, Some(&before), &node_newest(&images, &systemd));
    suite.run_after(PIVOTED, &mut bed, &scenarios![an_undo_runs_the_booted_systemd]);
    suite.finish()
}

#[test]
fn the_newest_release_with_a_composefs_root_pivots() -> Result<()> {
    let images = Pair::newest_base()?;
    let mut suite = Suite::new("container: Debian's newest suite becomes a node image of that suite");
    let mut bed = boot(&images, "container-newest-base", Root::Composefs, |_| Ok(()))?;
    let before = Before::of(&bed.guest)?;
    let systemd = newest_systemd(&bed.guest)?;
    suite.run(&mut bed, &scenarios![the_machine_becomes_its_node_image]);
    pivoted(&mut suite, PIVOTED, &bed.guest, Some(&before), &node_newest(&images, &systemd));
    has_one_overlay(&mut suite, PIVOTED, &bed.guest);
    suite.run_after(PIVOTED, &mut bed, &scenarios![runc_seals_its_program_with_an_overlay]);
    undoes(&mut suite, PIVOTED, &bed.guest);
    suite.finish()
}

#[test]
fn the_newest_release_is_switched_in_use() -> Result<()> {
    let images = Pair::newest_base()?;
    let mut suite = Suite::new("container: Debian's newest suite in the flow of the assisted installer");
    let mut bed = boot(&images, "container-newest-assisted", Root::Plain, configured_later)?;
    suite.run(&mut bed, &scenarios![the_base_system_runs, the_image_is_configured after the_base_system_runs]);
    let before = Before::of(&bed.guest)?;
    let systemd = newest_systemd(&bed.guest)?;
    let expected = node_newest(&images, &systemd);
    switched_in_use(&mut suite, "the_image_is_configured", &bed.guest, Some(&before), &expected);
    suite.finish()
}

fn the_base_system_runs(bed: &mut Bed) -> Result<()> {
    bed.guest.wait_unit("multi-user.target", "active", Duration::from_secs(180))
}

fn the_image_is_configured(bed: &mut Bed) -> Result<()> {
    configured_now(&bed.guest)
}

fn the_machine_becomes_its_node_image(bed: &mut Bed) -> Result<()> {
    wait_pivoted(&bed.guest, Duration::from_secs(400))
}

/// The agent that undoes has the libraries of the newest suite.
fn an_undo_runs_the_booted_systemd(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
    guest.ask("systemctl restart node-image-pivotd.service && node-image-pivot undo")?;
    same(guest.ask("base-tool && ! command -v oc")?, "base-tool 1.0".into())?;
    contains(&guest.ask("systemctl show --property=Version --value")?, "252")?;
    nothing_failed(guest)
}

/// A created container runs the program of runc until it is started. From release 1.2 on, that is a file of a detached
/// overlay on the directory of /usr, or a copy in memory if the kernel accepts no overlay there.
fn runc_seals_its_program_with_an_overlay(bed: &mut Bed) -> Result<()> {
    let guest = &bed.guest;
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
