//! The same base system with a composefs root as live media: the bootstrap flow from an ISO file system, and the assisted flow
//! from a PXE server.

use anyhow::Result;
use testbed::files::Files;
use testbed::images::{Pair, work_dir};
use testbed::in_use::switched_in_use;
use testbed::overlays::{has_one_overlay, undoes};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, configured_later, configured_now, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::boots_as_a_live_system;
use testbed::vm::{self, Medium, Vm};

use super::{BOOT, PIVOT, has_a_composefs_root_without_fs_verity};

struct Live {
    guest: Vm,
    _registry: Registry,
    before: Option<Before>,
}

impl Live {
    fn boot(pair: &Pair, medium: Medium<'_>, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Self> {
        let registry = Registry::start(&pair.storage, &work_dir("vm-composefs-registry")?, None, None)?;
        let setup = vm::Setup { medium, ..vm::Setup::live("vm-composefs", &pair.boot) };
        let guest = Vm::start(pair, &setup, |files| {
            node_files(files, &pair.image.by_digest(), vm::HOST, registry.port)?;
            fill(files)
        })?;
        Ok(Live { guest, _registry: registry, before: None })
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
    suite.run(
        &mut live,
        &scenarios![
            the_root_is_a_composefs after the_machine_boots,
            the_image_is_configured after the_root_is_a_composefs,
        ],
    );
    let expected = Expected::node_a(&pair.image);
    switched_in_use(&mut suite, "the_image_is_configured", &live.guest, live.before.as_ref(), &expected);
    let earlier = "both_units_become_active_when_an_installer_starts_them";
    has_one_overlay(&mut suite, earlier, &live.guest);
    undoes(&mut suite, earlier, &live.guest);
    suite.finish()
}

fn the_machine_boots(live: &mut Live) -> Result<()> {
    live.guest.wait_ssh(BOOT)
}

fn the_root_is_a_composefs(live: &mut Live) -> Result<()> {
    live.before = Some(Before::of(&live.guest)?);
    has_a_composefs_root_without_fs_verity(&live.guest)
}

fn the_image_is_configured(live: &mut Live) -> Result<()> {
    configured_now(&live.guest)
}

fn the_machine_becomes_its_node_image(live: &mut Live) -> Result<()> {
    wait_pivoted(&live.guest, PIVOT)
}
