//! The newest systemd, from a suite of Debian that changes each day: a change there decides the result, not a change of the
//! agent alone. On a real systemd in a container.
//! `make check-newest`

use std::time::Duration;

use anyhow::{Context as _, Result};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;

const PIVOTED: &str = "the_machine_becomes_its_node_image";

#[test]
fn the_newest_release_is_pulled() -> Result<()> {
    let images = Pair::newest()?;
    let mut suite = Suite::new("container: Debian 12 becomes a node image of Debian's newest suite");
    let network = Network::new()?;
    let registry =
        Registry::start(&images.storage, &work_dir("container-newest-registry")?, Some(network.pid()), None)?;
    let guest = Container::start(&images, &network, &Setup::live("container-newest", &images.boot), |files| {
        node_files(files, &images.image.by_digest(), "127.0.0.1", registry.port)
    })?;
    let mut bed = Bed { guest, registry, network };
    let before = Before::of(&bed.guest)?;
    suite.run(&mut bed, &scenarios![the_machine_becomes_its_node_image]);
    let version = bed.guest.ask("systemctl --version | cut -d ' ' -f 1,2 | head -n 1")?;
    let number: u32 = version.trim_start_matches("systemd ").parse().with_context(|| version.clone())?;
    same((number, number > 257), (number, true))?;
    let newest = Expected { systemd: &version, os: "/sid", ..Expected::node_a(&images.image) };
    pivoted(&mut suite, PIVOTED, &bed.guest, Some(&before), &newest);
    suite.run_after(PIVOTED, &mut bed, &scenarios![an_undo_runs_the_booted_systemd]);
    suite.finish()
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
