//! A bootimage without the agent, which Ignition sets up in the initramfs of the first boot.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::check::same;
use crate::deliver::{pack, with_initramfs};
use crate::files::Files;
use crate::guest::Guest;
use crate::images::Images;
use crate::scenarios;
use crate::suite::Suite;

/// Configuration of a machine: a file, a preset, and units, two of which are enabled.
const CONFIG: &str = include_str!("../../bed/user.ign");

/// Kernel arguments of the first boot. The wizard of systemd would ask on the console.
pub const KARGS: [&str; 3] = ["ignition.firstboot", "ignition.platform.id=metal", "systemd.firstboot=no"];

/// Creates a live bootimage in the directory `into`. Its initramfs has Ignition with the configuration of a machine, and with
/// the fragment that writes the agent, which pulls `image`.
pub fn bootimage(images: &Images, image: &str, into: &Path) -> Result<()> {
    // Debian has Ignition 2.14.
    let fragment = pack(&["ignition", "--spec", "3.3.0"], image, into)?;
    let files = Files::new(into)?;
    files.put("/usr/lib/ignition/user.ign", 0o644, CONFIG)?;
    files.put("/usr/lib/ignition/base.d/50-node-image-pivot.ign", 0o644, &fs::read_to_string(fragment)?)?;
    // Ignition asks the distribution, as a live root cannot be remounted.
    files.put("/usr/bin/is-live-image", 0o755, "#!/bin/sh\n")?;
    let initramfs = into.join("ignition.img");
    files.append(&images.initramfs_ignition()?, ".", &initramfs)?;
    with_initramfs(&images.stock()?, &[initramfs], into)
}

/// Adds what CoreOS has in its image: no identity before the first boot, and presets that leave other units alone.
pub fn first_boot_files(files: &Files) -> Result<()> {
    files.put("/etc/machine-id", 0o444, "uninitialized\n")?;
    files.put("/etc/systemd/system-preset/99-default-disable.preset", 0o644, "disable *\n")
}

type AnyGuest<'a> = &'a dyn Guest;

/// Runs the scenarios about a machine that Ignition has set up and that has not pivoted yet.
pub fn set_up(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) -> bool {
    let list = scenarios![ignition_wrote_the_agent, presets_enable_the_units_that_ignition_wrote];
    suite.run_after(earlier, &mut guest, &list)
}

fn ignition_wrote_the_agent(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.ask("test -e /etc/.ignition-result.json")?;
    guest.ask("test ! -e /usr/bin/node-image-pivot && test ! -e /run/node-image-pivot/bin")?;
    let files = "/var/usrlocal/bin/node-image-pivot /etc/systemd/system-generators/node-image-pivot-generator \
                 /etc/credstore/node-image-pivot.auth";
    same(guest.ask(&format!("stat -c '%U %a' {files}"))?, "root 755\nroot 755\nroot 600".to_owned())
}

fn presets_enable_the_units_that_ignition_wrote(guest: &mut AnyGuest<'_>) -> Result<()> {
    let units = "testbed-early.service testbed-late.service testbed-disabled.service";
    same(guest.ask(&format!("systemctl is-enabled {units}"))?, "enabled\nenabled\ndisabled".to_owned())
}

/// Runs the scenarios about the same machine after its pivot.
pub fn pivoted(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) -> bool {
    let list = scenarios![units_of_the_first_boot_run_once_each, a_file_of_ignition_is_kept];
    suite.run_after(earlier, &mut guest, &list)
}

/// One before the switch, and one after it.
fn units_of_the_first_boot_run_once_each(guest: &mut AnyGuest<'_>) -> Result<()> {
    let ran = "==> /var/lib/testbed-early <==\nran\n\n==> /var/lib/testbed-late <==\nran";
    same(guest.ask("tail /var/lib/testbed-*")?, ran.to_owned())
}

fn a_file_of_ignition_is_kept(guest: &mut AnyGuest<'_>) -> Result<()> {
    let file = "/etc/base-tool/by-ignition.conf";
    same(guest.ask(&format!("cat {file}; stat -c %a {file}"))?, "written by Ignition\n640".to_owned())
}
