//! The switch on a machine whose `/usr` is on so many stacked overlays that the kernel accepts no further one.

use super::*;
use overlay_root::DetachedTree;

/// Returns a booted system whose `/usr` is an overlay of an overlay.
fn machine(scratch: &Path) -> Machine<'_> {
    let mut machine = Machine::booted(scratch, |repo, commit| {
        let empty = scratch.join("empty");
        fs::create_dir(&empty).unwrap();
        let mut below = scratch.join("usr");
        checkout(repo, commit, &below);
        for level in ["one", "two"] {
            let place = scratch.join(level);
            fs::create_dir(&place).unwrap();
            DetachedTree::overlay(&[&empty, &below], level).unwrap().expose_in(&here(), &place).unwrap();
            below = place;
        }
        (below.clone(), Base::Bound(below))
    });
    machine.delta.complete = Some(build_complete(&machine));
    machine
}

/// Builds the complete tree beside the delta, where [`Base::Bound`] expects it.
fn build_complete(machine: &Machine<'_>) -> overlay_root::delta::DeltaCounts {
    let store = machine.scratch.join("store");
    let (opened, keep) = (NodeStore::open(&store).unwrap(), Keep::default());
    let complete = overlay_root::delta::complete(&opened, &machine.usr, id(&machine.target), &keep).unwrap();
    complete.build(&store.join(SOURCE)).unwrap().counts
}

#[test]
fn a_complete_tree_is_bound_where_no_overlay_can_be_mounted() {
    private(|scratch| {
        let machine = machine(scratch);
        assert!(Base::Directory(machine.usr.clone()).probe().is_err());
        assert!(machine.base.probe().unwrap(), "an overlay fits on the complete tree");
        let mounts = here().mounts().unwrap();
        machine.switch();
        machine.compare();
        let flags = rustix::fs::statvfs(&machine.usr).unwrap().f_flag;
        assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY));
        assert!(
            !flags.contains(rustix::fs::StatVfsMountFlags::NOSUID),
            "the store has the flag, the new /usr does not"
        );
        // The booted modules are a mount in the tree, and no obstacle to an undo.
        assert_eq!(here().mounts().unwrap().len(), mounts.len() + 2);
        assert!(overlay_root::mounted_on(&here().mounts().unwrap(), &machine.usr, SOURCE).is_empty());
        let below = here().run_without(&machine.usr, SOURCE, || Ok(describe(&machine.usr))).unwrap();
        assert_eq!(below, machine.booted_usr);
        assert!(DetachedTree::overlay(&[&scratch.join("empty"), &machine.usr], "extension").is_ok());

        machine.undo();
        assert_eq!(describe(&machine.usr), machine.booted_usr);
        assert_eq!(describe(&machine.etc), machine.local_etc);
        assert_eq!(here().mounts().unwrap(), mounts);
    });
}
