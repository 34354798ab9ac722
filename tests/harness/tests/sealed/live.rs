//! The same base system with a composefs root as a live medium, an ISO file system.

use std::time::Duration;

use anyhow::Result;
use testbed::images::{Pair, work_dir};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, node_files, pivoted, wait_pivoted};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::vm::{self, Medium, Vm};

use super::{BOOT, PIVOT, has_a_composefs_root_without_fs_verity, has_one_overlay, undoes};

struct Live {
    guest: Vm,
    _registry: Registry,
    before: Option<Before>,
}

impl Live {
    fn boot(pair: &Pair) -> Result<Self> {
        let registry = Registry::start(&pair.storage, &work_dir("vm-composefs-registry")?, None, None)?;
        let setup = vm::Setup {
            name: "vm-composefs",
            boot: &pair.boot,
            medium: Medium::Iso,
            spare: None,
            recording: None,
            kargs: &[],
            memory_mib: 3072,
            cpu: vm::CPU,
            limit: Duration::from_secs(1500),
        };
        let guest =
            Vm::start(pair, &setup, |files| node_files(files, &pair.image.by_digest(), vm::HOST, registry.port))?;
        Ok(Live { guest, _registry: registry, before: None })
    }
}

#[test]
fn a_live_system_with_a_composefs_root_pivots() -> Result<()> {
    let pair = Pair::sealed()?;
    let mut suite = Suite::new("machine: live with a composefs root, the bootstrap flow");
    let mut live = Live::boot(&pair)?;
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

fn the_machine_boots(live: &mut Live) -> Result<()> {
    live.guest.wait_ssh(BOOT)
}

fn the_root_is_a_composefs(live: &mut Live) -> Result<()> {
    live.before = Some(Before::of(&live.guest)?);
    has_a_composefs_root_without_fs_verity(&live.guest)
}

fn the_machine_becomes_its_node_image(live: &mut Live) -> Result<()> {
    wait_pivoted(&live.guest, PIVOT)
}
