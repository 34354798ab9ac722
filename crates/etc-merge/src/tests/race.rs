//! Races with a process that exchanges entries in a loop. The merge must not change or copy files outside of `/etc`.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::real::write_tree;
use super::*;
use support::testing::private;

/// Exchanges two paths in a loop while `work` runs.
fn while_exchanging(one: &Path, two: &Path, work: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Fails if the merge has just removed one of the paths; the next round restores it.
                let _ = renameat_with(CWD, one, CWD, two, RenameFlags::EXCHANGE);
            }
        });
        work();
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_directory_replaced_by_a_link_is_not_followed() {
    private(|scratch| {
        // The target of the link has the names that the plan changes, removes and reads.
        let (outside, inside) = (scratch.join("outside"), scratch.join("etc/d"));
        let names = || (0..6).map(|number| ["f0", "f1", "f2", "f3", "f4", "f5"][number]);
        let of =
            |content: u8, count: usize| etc([("d", dir(0, names().take(count).map(|name| (name, file(content, 0)))))]);
        write_tree(&scratch.join("base"), &of(1, 6));
        write_tree(&scratch.join("new"), &of(2, 3));
        fs::create_dir(&outside).unwrap();
        for name in names() {
            fs::write(outside.join(name), text(1)).unwrap();
        }
        let [base, new] = ["base", "new"].map(|name| open_dir(&scratch.join(name)).unwrap());
        let (mut applied, mut skipped, mut rounds) = (0, 0, 0);
        let end = Instant::now() + Duration::from_secs(120);
        while (applied < 10 || skipped < 10) && Instant::now() < end {
            rounds += 1;
            let _ = fs::remove_dir_all(scratch.join("etc"));
            write_tree(&scratch.join("etc"), &of(1, 6));
            let link = scratch.join("etc/link");
            std::os::unix::fs::symlink("../outside", &link).unwrap();
            let current = open_dir(&scratch.join("etc")).unwrap();
            let undo_dir = scratch.join(format!("state-{rounds}/undo"));
            while_exchanging(&inside, &link, || {
                // Plan, merge and undo while names change their type. Errors are acceptable; the test checks the files
                // afterwards.
                if let Ok(plan) = plan(base.as_fd(), new.as_fd(), current.as_fd(), &Defaults::default()) {
                    if let Ok(report) = apply(&plan, new.as_fd(), current.as_fd(), &undo_dir) {
                        applied += report.applied;
                        skipped += report.skipped.len();
                    }
                    let _ = undo(&undo_dir, current.as_fd());
                }
            });
            let mut left: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            left.sort();
            assert_eq!(left, names().collect::<Vec<_>>(), "entries outside of /etc were created or removed");
            for name in names() {
                assert_eq!(fs::read_to_string(outside.join(name)).unwrap(), text(1), "round {rounds}: {name}");
            }
        }
        assert!(applied >= 10 && skipped >= 10, "{rounds} rounds, {applied} applied, {skipped} skipped");
    });
}

#[test]
fn a_file_replaced_by_a_link_is_not_read() {
    private(|scratch| {
        let of = |content| etc([("f", file(content, 0))]);
        for (name, content) in [("base", 1), ("new", 2), ("etc", 1)] {
            write_tree(&scratch.join(name), &of(content));
        }
        fs::write(scratch.join("secret"), "secret").unwrap();
        let link = scratch.join("etc/link");
        std::os::unix::fs::symlink("../secret", &link).unwrap();
        let current = open_dir(&scratch.join("etc")).unwrap();
        let secret = hex::encode(Sha256::digest("secret"));
        let (mut links, mut files) = (0, 0);
        while_exchanging(&scratch.join("etc/f"), &link, || {
            let end = Instant::now() + Duration::from_secs(120);
            while (links < 20 || files < 20) && Instant::now() < end {
                let Ok(seen) = scan(current.as_fd()) else { continue };
                match seen.root.children.get(&b"f"[..]).map(|entry| &entry.leaf.content) {
                    Some(Content::File { sha256, .. }) => {
                        assert_ne!(*sha256, secret, "the target of the link was read");
                        files += 1;
                    }
                    Some(Content::Symlink(_)) => links += 1,
                    _ => {}
                }
            }
        });
        assert!(links >= 20 && files >= 20, "{links} {files}");
    });
}
