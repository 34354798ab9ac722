//! The diff of a plan: `git apply` makes of it what the plan says, and it gives away nothing.

use std::os::fd::AsFd;
use std::process::Command;

use super::real::{rescan, write_tree};
use super::*;
use crate::mount::testing::private;

fn world(entry: Entry) -> Entry {
    let meta = Meta { mode: if entry.leaf.is_directory() { 0o755 } else { 0o644 }, ..Meta::default() };
    let children = entry.children.into_iter().map(|(name, child)| (name, world(child))).collect();
    Entry { leaf: Leaf { meta, ..entry.leaf }, obstacle: None, children }
}

fn diff_of(place: &std::path::Path, secrets: bool) -> String {
    let [base, new, etc] = ["base", "new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    let plan = plan(base.as_fd(), new.as_fd(), etc.as_fd(), &Defaults::default()).unwrap();
    String::from_utf8(diff(&plan, new.as_fd(), etc.as_fd(), secrets).unwrap()).unwrap()
}

#[test]
fn git_makes_of_it_what_the_plan_says() {
    private(|scratch| {
        let base = etc([("d", dir(0, [("a", file(1, 0))])), ("gone", file(3, 0)), ("x", file(1, 0)), ("l", link(1))]);
        let new =
            etc([("d", dir(0, [("a", file(2, 0))])), ("new \"file\"", file(4, 0)), ("x", file(2, 0)), ("l", link(2))]);
        let current =
            etc([("d", dir(0, [("a", file(1, 0))])), ("gone", file(3, 0)), ("x", file(3, 0)), ("l", link(1))]);
        let trees = [base, new, current].map(|tree| Snapshot { root: world(tree.root) });
        for (name, tree) in ["base", "new", "etc"].into_iter().zip(&trees) {
            write_tree(&scratch.join(name), tree);
        }
        let text = diff_of(scratch, false);
        std::fs::write(scratch.join("diff"), &text).unwrap();
        let applied = Command::new("git").args(["apply", "--verbose", "diff"]).current_dir(scratch).output().unwrap();
        assert!(applied.status.success(), "{text}\n{}", String::from_utf8_lossy(&applied.stderr));
        let plan = decide(&trees[0], &trees[1], &trees[2]);
        let content = |tree: &Snapshot| -> BTreeMap<Bytes, Content> {
            flat(tree).into_iter().map(|(path, leaf)| (path, leaf.content)).collect()
        };
        assert_eq!(content(&rescan(&scratch.join("etc"))), content(&outcome(&plan, &trees[2])), "{text}");
        assert!(text.contains("# conflict: /etc/x: "), "{text}");
        assert!(text.contains("# +content 2\n") && !text.contains("\n+++ b/etc/x\n"), "only as a comment: {text}");
    });
}

#[test]
fn secrets_and_binary_files_are_only_named() {
    private(|scratch| {
        let secret = |content| {
            let mut entry = file(content, 0);
            entry.leaf.meta.mode = 0o640;
            entry
        };
        let below = |content| {
            let mut entry = dir(0, [("key", file(content, 0))]);
            entry.leaf.meta.mode = 0o700;
            entry
        };
        let with = |content| {
            let mut tree = etc([("open", file(content, 0)), ("secret", secret(content)), ("private", below(content))]);
            tree.root.leaf.meta.mode = 0o755;
            tree
        };
        for (name, tree) in [("base", with(1)), ("new", with(2)), ("etc", with(1))] {
            write_tree(&scratch.join(name), &tree);
            std::fs::write(scratch.join(name).join("binary"), [0, if name == "new" { 1 } else { 0 }]).unwrap();
        }
        let text = diff_of(scratch, false);
        assert_eq!(text.matches("+content 2").count(), 2, "the open file's two lines only: {text}");
        assert_eq!(text.matches("--secrets shows it").count(), 2, "{text}");
        assert!(text.contains("Binary files a/etc/binary and b/etc/binary differ"), "{text}");
        let all = diff_of(scratch, true);
        assert_eq!(all.matches("+content 2").count(), 6, "{all}");
    });
}
