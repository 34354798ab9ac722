//! An installer switches an installed system in use. The node store is on its disk: a switch after an undo needs no registry,
//! and the disk has the node image after a power cut.

use std::path::PathBuf;

use anyhow::{Context, Result};
use testbed::check::{contains, same};
use testbed::disk::{self, on_disk};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::in_use::{InUse, SWITCHED, switched_in_use, undone_in_use};
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, configured_later, configured_now, node_files};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::left_alone;
use testbed::vm::{self, Vm};

use super::{PIVOT, fsck, is_stored_on_the_disk};

/// A machine that has booted without a pivot.
struct Installed {
    disk: PathBuf,
    registry: Registry,
    before: Option<(Before, InUse)>,
    on: Option<Vm>,
}

impl Installed {
    fn guest(&self) -> Result<&Vm> {
        self.on.as_ref().context("the machine is off")
    }
}

#[test]
fn an_installed_system_is_switched_in_use() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_a(images.image("node-a")?);
    let mut suite = Suite::new("machine: installed to a disk, the assisted flow");
    let registry = Registry::start(&images.storage, &work_dir("vm-disk-in-use-registry")?, None, None)?;
    let disk = disk::copy(&images.disk()?, &work_dir("vm-disk-in-use-image")?)?;
    let guest = Vm::boot_disk(images, "vm-disk-in-use", &disk, |files| {
        node_files(files, &expected.image.by_digest(), vm::HOST, registry.port)?;
        configured_later(files)
    })?;
    left_alone(&mut suite, &guest);
    let mut installed = Installed { disk, registry, before: None, on: Some(guest) };
    suite.run(&mut installed, &scenarios![the_image_is_configured]);
    if let Some(guest) = &installed.on {
        let before = installed.before.as_ref();
        switched_in_use(&mut suite, "the_image_is_configured", guest, before.map(|(before, _)| before), &expected);
    }
    suite.run_after(SWITCHED, &mut installed, &scenarios![nothing_writes_to_the_repo_after_the_unit_is_active]);
    if let Some(guest) = &installed.on {
        is_stored_on_the_disk(&mut suite, SWITCHED, guest);
        undone_in_use(&mut suite, guest, installed.before.as_ref().map(|(_, in_use)| in_use));
    }
    suite.run_after(
        "undo_shows_the_booted_usr_while_the_system_is_in_use",
        &mut installed,
        &scenarios![
            a_switch_after_the_undo_needs_no_registry,
            the_disk_has_the_node_image_after_a_power_cut after a_switch_after_the_undo_needs_no_registry,
        ],
    );
    suite.finish()
}

fn the_image_is_configured(installed: &mut Installed) -> Result<()> {
    let guest = installed.guest()?;
    configured_now(guest)?;
    installed.before = Some((Before::of(guest)?, InUse::of(guest)?));
    Ok(())
}

/// Installers write to the repo then. The unit was restarted since it became active.
fn nothing_writes_to_the_repo_after_the_unit_is_active(installed: &mut Installed) -> Result<()> {
    let started = "MESSAGE_ID=39f53479d3a045ac8e11786248231fbf";
    let first = format!("journalctl -o short-unix -u node-image-overlay.service {started} | head -n 1");
    let guest = installed.guest()?;
    let since = guest.ask(&format!("{first} | cut -d ' ' -f 1"))?;
    same(since.is_empty(), false)?;
    same(guest.ask(&format!("find /sysroot/ostree/repo -newerct @{since}"))?, String::new())
}

fn a_switch_after_the_undo_needs_no_registry(installed: &mut Installed) -> Result<()> {
    installed.registry.stop();
    let guest = installed.guest()?;
    guest.ask("systemctl restart --no-block node-image-overlay.service")?;
    guest.wait_unit("node-image-overlay.service", "active", PIVOT)?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())
}

fn the_disk_has_the_node_image_after_a_power_cut(installed: &mut Installed) -> Result<()> {
    installed.on.take().context("the machine is off")?.power_cut();
    contains(&on_disk(&installed.disk, "ostree refs --repo=ostree/repo")?, "coreos/node-image")?;
    fsck(&installed.disk)
}
