//! A complete tree that is bound over /usr: an agent that is killed at any act on it completes or undoes the switch.

use anyhow::{Result, bail};
use testbed::check::{contains, same};
use testbed::guest::Guest;
use testbed::scenarios;
use testbed::suite::Suite;

use super::acts::hits;
use super::bed::Bed;

/// Acts on the trees and on the mount of /usr. All others are the same with an overlay.
const ACTS: [&str; 7] = ["record", "delta", "delta-publish", "overlay", "expose", "exposed", "withdraw"];

/// Runs the scenarios in a container whose /usr is the node image's, by a complete tree in RAM.
pub fn killed(suite: &mut Suite, bed: &mut Bed) -> Result<()> {
    suite.run(bed, &scenarios![the_complete_tree_is_removed_by_an_undo]);
    bed.guest.ask("systemctl stop node-image-pivotd.service; : >/run/failpoints/hits")?;
    bed.agent("run")?;
    let switch = of_the_tree(hits(bed, "switch")?)?;
    bed.agent("undo")?;
    let undo = of_the_tree(hits(bed, "undo")?)?;
    suite.each("killed_in_a_switch_to_a_complete_tree", None, bed, switch, |bed, point| is_killed(bed, "run", point));
    suite.run(bed, &scenarios![a_killed_switch_to_a_complete_tree_is_completed]);
    suite.each("killed_in_an_undo_of_a_complete_tree", None, bed, undo, |bed, point| is_killed(bed, "undo", point));
    suite.run(bed, &scenarios![the_complete_tree_is_removed_by_an_undo]);
    Ok(())
}

/// Selects the failpoints that are acts on a tree.
fn of_the_tree(points: Vec<String>) -> Result<Vec<(String, String)>> {
    let is_act = |point: &String| ACTS.contains(&point.split(' ').next().unwrap_or_default());
    let acts: Vec<_> = points.into_iter().filter(is_act).map(|point| (point.clone(), point)).collect();
    if acts.is_empty() { bail!("no act on a tree") } else { Ok(acts) }
}

fn is_killed(bed: &Bed, command: &str, point: &str) -> Result<()> {
    bed.arm(point, "kill")?;
    if !bed.killed_in(command)? {
        bail!("not reached: {}", bed.guest.ask("cat /run/asked")?);
    }
    bed.consistent()
}

fn a_killed_switch_to_a_complete_tree_is_completed(bed: &mut Bed) -> Result<()> {
    bed.agent("run")?;
    same(bed.guest.ask("base-tool && findmnt -nr -o FSROOT /usr")?, "base-tool 2.0\n/node-image".into())?;
    bed.guest.ask("findmnt --mountpoint /usr/lib/modules && touch -c /run/node-image-pivot/store/node-image")?;
    contains(&bed.agent("status --json")?, "a complete tree, bound over /usr")?;
    bed.nothing_failed()
}

fn the_complete_tree_is_removed_by_an_undo(bed: &mut Bed) -> Result<()> {
    bed.agent("undo")?;
    same(bed.guest.ask("base-tool")?, "base-tool 1.0".into())?;
    bed.guest.ask("! findmnt --mountpoint /usr && test ! -e /run/node-image-pivot/store/node-image")?;
    bed.nothing_failed()
}
