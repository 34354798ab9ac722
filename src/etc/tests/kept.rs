//! Entries that the merge keeps, and changes by others at the same moment.

use std::fs;
use std::os::fd::AsFd;

use super::real::{plan_in, rescan, stage, undo_in, write_tree};
use super::*;
use crate::etc::place::{Outcome, Place, Source};
use crate::etc::staging::Staging;
use crate::mount::testing::private;

const NONE: rustix::mount::MountFlags = rustix::mount::MountFlags::empty();

fn apply_in(place: &std::path::Path, plan: &Plan) -> Report {
    let [new, etc] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    apply(plan, new.as_fd(), etc.as_fd(), &place.join("state/undo"), None).unwrap()
}

#[test]
fn a_save_between_the_last_look_and_the_rename_is_kept() {
    private(|scratch| {
        write_tree(&scratch.join("etc"), &etc([("f", file(1, 0)), ("gone", file(1, 0))]));
        write_tree(&scratch.join("new"), &etc([("f", file(2, 0)), ("d", dir(0, []))]));
        let [etc, new] = ["etc", "new"].map(|name| open_dir(&scratch.join(name)).unwrap());
        let path = Bytes::from("f");
        let place = Place::find(etc.as_fd(), &path).unwrap().unwrap();
        let current = place.look().unwrap().unwrap();
        for (number, replacement) in [file(2, 0), dir(0, []), link(1)].into_iter().enumerate() {
            let staging = Staging::open(etc.as_fd()).unwrap();
            let content = Place::find(new.as_fd(), &path).unwrap().unwrap().open().unwrap();
            let mut source = Source { content: Some(content), ..Source::default() };
            staging.make(number, &replacement.leaf, &mut source).unwrap();
            // An editor saves: it writes the file in place, or renames another one over it.
            if number == 0 {
                fs::write(scratch.join("etc/f"), "saved in place").unwrap();
            } else {
                fs::write(scratch.join("etc/f.swp"), "saved by a rename").unwrap();
                fs::rename(scratch.join("etc/f.swp"), scratch.join("etc/f")).unwrap();
            }
            let outcome = staging.put(number, &place, Some(&current)).unwrap();
            assert_eq!(outcome, Outcome::Skipped("changed since the plan was made"));
            assert!(fs::read_to_string(scratch.join("etc/f")).unwrap().starts_with("saved"));
            staging.close().unwrap();
        }
        let staging = Staging::open(etc.as_fd()).unwrap();
        assert!(matches!(staging.take_out(0, &place, &current).unwrap(), Outcome::Skipped(_)));
        assert!(fs::read_to_string(scratch.join("etc/f")).unwrap().starts_with("saved"));
        staging.close().unwrap();
        assert_eq!(fs::read_dir(scratch.join("etc")).unwrap().count(), 2, "no temporary file is left");
    });
}

#[test]
fn the_mode_of_etc_itself_is_merged_when_it_is_a_mount_point() {
    private(|scratch| {
        let trees = || [0, 2, 0].map(|number| Snapshot { root: dir(number, [("a", file(1, 0))]) });
        let place = stage(scratch, "mode", &trees());
        rustix::mount::mount("etc", place.join("etc"), "tmpfs", NONE, None).unwrap();
        write_tree(&place.join("etc"), &trees()[2]);
        assert_eq!(apply_in(&place, &plan_in(&place)).skipped, []);
        assert_eq!(rescan(&place.join("etc")), trees()[1]);
        undo_in(&place);
        assert_eq!(rescan(&place.join("etc")), trees()[2]);
    });
}

#[test]
fn copies_of_conflicts_count_as_space() {
    private(|scratch| {
        let place = stage(scratch, "aside", &[1, 2, 3].map(|content| etc([("a", file(content, 0))])));
        fs::write(place.join("new/a"), vec![0; 3 << 20]).unwrap();
        let plan = plan_in(&place);
        assert_eq!((plan.count(Class::Conflict), plan.bytes()), (1, 3 << 20));
        let small = place.join("small");
        fs::create_dir(&small).unwrap();
        rustix::mount::mount("small", &small, "tmpfs", NONE, Some(c"size=2m")).unwrap();
        let missing = check_room(&plan, &place, &small).unwrap();
        assert!(missing.len() == 1 && missing[0].contains("needs up to 3."), "{missing:?}");
    });
}

#[test]
fn names_of_one_file_are_merged_each_on_its_own() {
    private(|scratch| {
        let both = |one, two| etc([("a", file(one, 0)), ("b", file(two, 0))]);
        let place = stage(scratch, "links", &[both(1, 1), both(2, 1), both(1, 1)]);
        fs::remove_file(place.join("etc/b")).unwrap();
        fs::hard_link(place.join("etc/a"), place.join("etc/b")).unwrap();
        assert_eq!(apply_in(&place, &plan_in(&place)).skipped, []);
        assert_eq!(rescan(&place.join("etc")), both(2, 1), "the other name keeps its content");
        undo_in(&place);
        assert_eq!(rescan(&place.join("etc")), both(1, 1));
    });
}
