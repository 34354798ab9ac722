//! The same base system as live media: the bootstrap flow from an ISO file system, and the assisted flow from a PXE server.
//! The assisted flow also on its disk, with a repo that does not demand fs-verity, so that the node store is there.

use std::fs::read_to_string;

use anyhow::Result;
use testbed::disk::{self, on_disk};
use testbed::files::Files;
use testbed::images::{Pair, work_dir};
use testbed::in_use::{InUse, SWITCHED, switched_in_use, undone_in_use};
use testbed::overlays::{has_one_overlay, undoes};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, configured_later, configured_now, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::{boots_as_a_live_system, left_alone};
use testbed::vm::{self, Medium, Vm};

use super::{BOOT, PIVOT, has_a_composefs_root_without_fs_verity, stores_on_the_disk};

struct Live {
    guest: Vm,
    _registry: Registry,
    before: Option<Before>,
    in_use: Option<InUse>,
}

impl Live {
    fn boot(pair: &Pair, medium: Medium<'_>, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Self> {
        let registry = Registry::start(&pair.storage, &work_dir("vm-composefs-registry")?, None, None)?;
        // Media have their own.
        let kargs =
            if matches!(medium, Medium::Disk(_)) { read_to_string(pair.boot.join("kargs"))? } else { String::new() };
        let setup = vm::Setup { medium, kargs: &[kargs.trim()], ..vm::Setup::live("vm-composefs", &pair.boot) };
        let guest = Vm::start(pair, &setup, |files| {
            node_files(files, &pair.image.by_digest(), vm::HOST, registry.port)?;
            fill(files)
        })?;
        Ok(Live { guest, _registry: registry, before: None, in_use: None })
    }
}

#[test]
fn a_live_system_with_a_composefs_root_pivots() -> Result<()> {
    let pair = Pair::sealed()?;
    let mut suite = Suite::new("machine: live with a composefs root, the bootstrap flow");
    let mut live = Live::boot(&pair, Medium::Iso, |_| Ok(()))?;
    suite.run(
        &mut live,
        &scenarios![
            the_machine_boots,
            the_root_is_a_composefs after the_machine_boots,
            the_machine_becomes_its_node_image after the_root_is_a_composefs,
        ],
    );
    let earlier = "the_machine_becomes_its_node_image";
    pivoted(&mut suite, earlier, &live.guest, live.before.as_ref(), &Expected::node_a(&pair.image));
    has_one_overlay(&mut suite, earlier, &live.guest);
    undoes(&mut suite, earlier, &live.guest);
    suite.finish()
}

#[test]
fn a_live_system_with_a_composefs_root_is_switched_in_use() -> Result<()> {
    let pair = Pair::sealed()?;
    let mut suite = Suite::new("machine: live with a composefs root, the assisted flow");
    let mut live = Live::boot(&pair, Medium::Pxe, configured_later)?;
    suite.run(&mut live, &scenarios![the_machine_boots]);
    boots_as_a_live_system(&mut suite, &live.guest, &pair.boot, &pair.image);
    switches_in_use(&mut suite, &mut live, &pair);
    undone_in_use(&mut suite, &live.guest, live.in_use.as_ref());
    suite.finish()
}

#[test]
fn an_installed_system_with_a_composefs_root_is_switched_in_use() -> Result<()> {
    let pair = Pair::sealed()?;
    let mut suite = Suite::new("machine: installed with a composefs root, the assisted flow");
    let disk = disk::copy(&pair.boot, &work_dir("vm-composefs-image")?)?;
    on_disk(&disk, "ostree config --repo=ostree/repo set ex-integrity.fsverity no")?;
    let mut installed = Live::boot(&pair, Medium::Disk(&disk), configured_later)?;
    suite.run(&mut installed, &scenarios![the_machine_boots]);
    left_alone(&mut suite, &installed.guest);
    switches_in_use(&mut suite, &mut installed, &pair);
    stores_on_the_disk(&mut suite, SWITCHED, &installed.guest);
    undone_in_use(&mut suite, &installed.guest, installed.in_use.as_ref());
    suite.finish()
}

/// Runs the scenarios of the assisted flow.
fn switches_in_use(suite: &mut Suite, live: &mut Live, pair: &Pair) {
    suite.run(
        live,
        &scenarios![
            the_root_is_a_composefs after the_machine_boots,
            the_image_is_configured after the_root_is_a_composefs,
        ],
    );
    let expected = Expected::node_a(&pair.image);
    switched_in_use(suite, "the_image_is_configured", &live.guest, live.before.as_ref(), &expected);
    has_one_overlay(suite, SWITCHED, &live.guest);
}

fn the_machine_boots(live: &mut Live) -> Result<()> {
    live.guest.wait_ssh(BOOT)
}

fn the_root_is_a_composefs(live: &mut Live) -> Result<()> {
    live.before = Some(Before::of(&live.guest)?);
    has_a_composefs_root_without_fs_verity(&live.guest)
}

fn the_image_is_configured(live: &mut Live) -> Result<()> {
    configured_now(&live.guest)?;
    live.in_use = Some(InUse::of(&live.guest)?);
    Ok(())
}

fn the_machine_becomes_its_node_image(live: &mut Live) -> Result<()> {
    wait_pivoted(&live.guest, PIVOT)
}
