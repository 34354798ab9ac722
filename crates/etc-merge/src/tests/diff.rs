//! Tests of the diff: `git apply` accepts it and produces the content of the plan, and the diff does not reveal
//! secrets.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::real::{plan_in, rescan, write_tree};
use super::*;
use crate::diff::{Sides, show};
use crate::undo::is_nested;
use support::testing::private;

fn world(entry: Entry) -> Entry {
    let meta = Meta { mode: if entry.leaf.is_directory() { 0o755 } else { 0o644 }, ..Meta::default() };
    let children = entry.children.into_iter().map(|(name, child)| (name, world(child))).collect();
    Entry { leaf: Leaf { meta, ..entry.leaf }, obstacle: None, children }
}

fn diff_of(place: &Path, secrets: bool) -> String {
    let [base, new, etc] = ["base", "new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
    let plan = plan(base.as_fd(), new.as_fd(), etc.as_fd(), &Defaults::default()).unwrap();
    String::from_utf8(diff(&plan, new.as_fd(), etc.as_fd(), secrets).unwrap()).unwrap()
}

#[test]
fn git_apply_produces_the_content_of_the_plan() {
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
        fs::write(scratch.join("diff"), &text).unwrap();
        let applied = Command::new("git").args(["apply", "--verbose", "diff"]).current_dir(scratch).output().unwrap();
        assert!(applied.status.success(), "{text}\n{}", String::from_utf8_lossy(&applied.stderr));
        let plan = decide(&trees[0], &trees[1], &trees[2]);
        let content = |tree: &Snapshot| -> BTreeMap<Bytes, Content> {
            flat(tree).into_iter().map(|(path, leaf)| (path, leaf.content)).collect()
        };
        assert_eq!(content(&rescan(&scratch.join("etc"))), content(&outcome(&plan, &trees[2])), "{text}");
        assert!(text.contains("# conflict: /etc/x: "), "{text}");
        assert!(
            text.contains("# +content 2\n") && !text.contains("\n+++ b/etc/x\n"),
            "the conflict is not only a comment: {text}"
        );
    });
}

#[test]
fn secret_and_binary_files_are_shown_by_name_only() {
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
            fs::write(scratch.join(name).join("binary"), [0, if name == "new" { 1 } else { 0 }]).unwrap();
        }
        let text = diff_of(scratch, false);
        assert_eq!(text.matches("+content 2").count(), 2, "not exactly the two lines of the open file: {text}");
        assert_eq!(text.matches("--secrets shows it").count(), 2, "{text}");
        assert!(text.contains("# binary files a/etc/binary and b/etc/binary differ"), "{text}");
        let all = diff_of(scratch, true);
        assert_eq!(all.matches("+content 2").count(), 6, "{all}");
    });
}

#[test]
fn a_file_in_place_of_a_directory_without_files_is_shown_by_name_only() {
    private(|scratch| {
        let base = etc([("d", dir(0, [("empty", dir(0, []))]))]);
        let trees = [base.clone(), etc([("d", file(1, 0))]), base].map(|tree| Snapshot { root: world(tree.root) });
        for (name, tree) in ["base", "new", "etc"].into_iter().zip(&trees) {
            write_tree(&scratch.join(name), tree);
        }
        let text = diff_of(scratch, false);
        assert!(text.contains("# /etc/d: not shown") && !text.contains("diff --git"), "{text}");
    });
}

#[test]
fn a_file_below_a_link_to_itself_is_shown_by_name_only() {
    private(|scratch| {
        let looped = || {
            let mut entry = link(1);
            entry.leaf.content = Content::Symlink(Bytes(b"d/x".to_vec()));
            entry
        };
        let base = etc([("d", looped())]);
        let new = etc([("d", dir(0, [("a", file(1, 0))]))]);
        let trees = [base.clone(), new, base].map(|tree| Snapshot { root: world(tree.root) });
        for (name, tree) in ["base", "new", "etc"].into_iter().zip(&trees) {
            write_tree(&scratch.join(name), tree);
        }
        let text = diff_of(scratch, false);
        assert!(text.contains("# /etc/d/a: not shown") && !text.contains("diff --git"), "{text}");
    });
}

/// A tree with unusual names and contents.
#[derive(Debug, Clone)]
enum Node {
    File(u32, &'static [u8]),
    Link(&'static [u8]),
    Dir(u32, BTreeMap<&'static [u8], Node>),
}

const NAMES: [&[u8]; 9] =
    [b"a", b"a b", b"quo\"te", b"back\\slash", b"new\nline", b"tab\t", b"\xff\xfe", b" end ", "\u{e4}".as_bytes()];
const CONTENTS: [&[u8]; 12] = [
    b"",
    b"x",
    b"x\n",
    b"a\r\nb\r\n",
    b"a\rb\rc\n",
    b"\0binary",
    b"\xff\xfe\n",
    b"--- a/etc/a\n+++ b/etc/a\n@@ -1 +1 @@\n-x\n",
    b"diff --git a/etc/a b/etc/a\ndeleted file mode 100644\n",
    b"\\ No newline at end of file\n",
    b"1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\n15\n16\n17\n18\n19\n20\n",
    b"one\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\n15\n16\n17\n18\n19\ntwenty",
];
const TARGETS: [&[u8]; 6] = [b"x", b"a", b"a b/c", b"./a b", b"two\nlines", b"\xff"];

fn node() -> impl Strategy<Value = Node> {
    let mode = || prop::sample::select(&[0o644, 0o644, 0o644, 0o600, 0o755, 0o4755, 0o640][..]);
    let leaf = prop_oneof![
        5 => (mode(), prop::sample::select(&CONTENTS[..])).prop_map(|(mode, content)| Node::File(mode, content)),
        1 => prop::sample::select(&TARGETS[..]).prop_map(Node::Link),
    ];
    let dir_mode = || prop::sample::select(&[0o755, 0o755, 0o755, 0o700][..]);
    leaf.prop_recursive(2, 16, 4, move |inner| {
        (dir_mode(), prop::collection::btree_map(prop::sample::select(&NAMES[..]), inner, 0..4))
            .prop_map(|(mode, children)| Node::Dir(mode, children))
    })
}

fn make(path: &Path, node: &Node) {
    use std::os::unix::fs::PermissionsExt;
    let mode = match node {
        Node::Link(target) => return std::os::unix::fs::symlink(Bytes(target.to_vec()).as_path(), path).unwrap(),
        Node::File(mode, content) => {
            fs::write(path, content).unwrap();
            mode
        }
        Node::Dir(mode, children) => {
            fs::create_dir_all(path).unwrap();
            children.iter().for_each(|(name, child)| make(&path.join(Bytes(name.to_vec()).as_path()), child));
            mode
        }
    };
    fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
}

/// Returns the properties that git tracks: files and links with their content, and whether a file is executable.
fn tracked_by_git(path: &Path) -> BTreeMap<Bytes, (Content, bool)> {
    let leaves = flat(&rescan(path)).into_iter().filter(|(_, leaf)| !leaf.is_directory());
    leaves.map(|(path, leaf)| (path, (leaf.content, leaf.meta.mode & 0o100 != 0))).collect()
}

#[test]
fn git_accepts_every_diff() {
    private(|scratch| {
        let roots = || prop::collection::btree_map(prop::sample::select(&NAMES[..]), node(), 0..5);
        // For each name in C: true to replace B's entry by another one.
        let changed = prop::collection::vec(prop::bool::weighted(0.2), NAMES.len());
        let round = std::cell::Cell::new(0);
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) });
        runner
            .run(&(roots(), roots(), roots(), changed, any::<bool>()), |(base, new, other, changed, secrets)| {
                round.set(round.get() + 1);
                let place = scratch.join(round.get().to_string());
                let mut current = base.clone();
                for (name, _) in NAMES.iter().zip(changed).filter(|(_, changed)| *changed) {
                    current.remove(name);
                    current.extend(other.get(name).map(|node| (*name, node.clone())));
                }
                fs::create_dir(&place).unwrap();
                for (name, children) in [("base", base), ("new", new), ("etc", current.clone()), ("git/etc", current)] {
                    make(&place.join(name), &Node::Dir(0o755, children));
                }
                let plan = plan_in(&place);
                let [new, etc] = ["new", "etc"].map(|name| open_dir(&place.join(name)).unwrap());
                let sides = Sides { new: new.as_fd(), etc: etc.as_fd(), secrets };
                let (text, hidden) = show(&plan, &sides).unwrap();
                fs::write(place.join("diff"), &text).unwrap();
                // `--allow-empty`: a diff can consist of comments only.
                let git = Command::new("git")
                    .args(["apply", "--allow-empty", "../diff"])
                    .current_dir(place.join("git"))
                    .output()
                    .unwrap();
                let shown = || format!("{}\n{}", String::from_utf8_lossy(&text), String::from_utf8_lossy(&git.stderr));
                prop_assert!(git.status.success(), "{}", shown());
                apply(&plan, new.as_fd(), etc.as_fd(), &place.join("state/undo")).unwrap();
                // git removes a directory with its last file.
                fs::create_dir_all(place.join("git/etc")).unwrap();
                let [mut by_git, mut by_merge] = ["git/etc", "etc"].map(|name| tracked_by_git(&place.join(name)));
                for side in [&mut by_git, &mut by_merge] {
                    side.retain(|path, _| !hidden.iter().any(|other| is_nested(other, path)));
                }
                prop_assert_eq!(by_git, by_merge, "{}", shown());
                fs::remove_dir_all(&place).unwrap();
                Ok(())
            })
            .unwrap();
    });
}
