//! Scenarios that machines and containers share about the mount of the new `/usr`: overlays on it, and its undo.

use anyhow::Result;

use crate::check::{contains, same};
use crate::guest::Guest;
use crate::scenarios;
use crate::suite::Suite;

type AnyGuest<'a> = &'a dyn Guest;

/// Runs the scenarios about the new `/usr` of a guest with a composefs root.
pub fn has_one_overlay(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) {
    let list = scenarios![the_new_usr_is_one_overlay_over_the_composefs_image];
    suite.run_after(earlier, &mut guest, &list);
    takes_another_overlay(suite, earlier, guest);
}

/// Runs the scenario about a new `/usr` on which the kernel accepts an overlay.
pub fn takes_another_overlay(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) {
    suite.run_after(earlier, &mut guest, &scenarios![a_system_extension_can_be_merged]);
}

/// Runs the scenario about the undo on a guest whose booted `/usr` is not a mount point.
pub fn undoes(suite: &mut Suite, earlier: &str, mut guest: &dyn Guest) {
    suite.run_after(earlier, &mut guest, &scenarios![an_undo_shows_the_booted_usr]);
}

fn the_new_usr_is_one_overlay_over_the_composefs_image(guest: &mut AnyGuest<'_>) -> Result<()> {
    let plan: serde_json::Value = serde_json::from_str(&guest.ask("cat /run/node-image-pivot/plan.json")?)?;
    contains(&plan["base"]["composefs"]["path"].to_string(), "/.ostree.cfs")?;
    same(plan["warnings"].to_string().contains("no further overlay"), false)?;
    // Kernels show the data-only layer in different ways.
    contains(&guest.ask("findmnt -n -o OPTIONS --mountpoint /usr")?, "/sysroot/ostree/repo/objects")
}

fn a_system_extension_can_be_merged(guest: &mut AnyGuest<'_>) -> Result<()> {
    let extension = "/run/extensions/more/usr";
    guest.ask(&format!("mkdir -p {extension}/bin {extension}/lib/extension-release.d"))?;
    guest.ask(&format!("echo ID=_any >{extension}/lib/extension-release.d/extension-release.more"))?;
    guest.ask(&format!("cp /usr/bin/echo {extension}/bin/extension && systemd-sysext merge"))?;
    same(guest.ask("extension merged && kubectl version --client >/dev/null")?.trim().into(), "merged".to_owned())?;
    same(guest.run("node-image-pivot undo")?.status, 10)?;
    guest.ask("systemd-sysext unmerge && test ! -e /usr/bin/extension && rm -r /run/extensions").map(drop)
}

fn an_undo_shows_the_booted_usr(guest: &mut AnyGuest<'_>) -> Result<()> {
    guest.ask("node-image-pivot undo && ! findmnt --mountpoint /usr && test ! -e /usr/bin/oc")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())
}
