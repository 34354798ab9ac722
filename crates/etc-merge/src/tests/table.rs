//! Tests of the table of decisions, by row and for all combinations.

use super::*;

fn at_x(entry: &Option<Entry>) -> Snapshot {
    etc(entry.clone().map(|entry| ("x", entry)))
}

/// Decides on a single entry. Returns the entry after the merge, and the class.
fn merge(base: &Option<Entry>, new: &Option<Entry>, current: &Option<Entry>) -> (Option<Entry>, Option<Class>) {
    let current = at_x(current);
    let plan = decide(&at_x(base), &at_x(new), &current);
    assert!(plan.decisions.len() <= 1);
    let after = outcome(&plan, &current).root.children.remove(&b"x"[..]);
    (after, plan.decisions.first().map(|decision| decision.class))
}

#[test]
fn every_combination_of_types() {
    let kinds = [
        None,
        Some(file(1, 0)),
        Some(file(2, 0)),
        Some(file(3, 0)),
        Some(link(1)),
        Some(link(2)),
        Some(dir(0, [])),
        Some(other()),
    ];
    for base in &kinds {
        for new in &kinds {
            for current in &kinds {
                let expected = if *current == Some(other()) {
                    (current, Some(Class::Local))
                } else if base == new && new == current {
                    (current, None)
                } else if current == new {
                    (current, Some(Class::Converged))
                } else if *new == Some(other()) {
                    (current, Some(Class::Conflict))
                } else if current == base {
                    (new, Some(Class::Updated))
                } else if new == base {
                    (current, Some(Class::Local))
                } else {
                    (current, Some(Class::Conflict))
                };
                let merged = merge(base, new, current);
                assert_eq!((&merged.0, merged.1), expected, "B {base:?}\nN {new:?}\nC {current:?}");
            }
        }
    }
}

#[test]
fn content_and_metadata_are_merged_separately() {
    for code in 0..729u32 {
        let digit = |place: u32| u8::try_from(code / 3u32.pow(place) % 3).unwrap();
        let [base, new, current] = [0, 2, 4].map(|place| (digit(place), digit(place + 1)));
        let part = |base: u8, new: u8, current: u8| match () {
            () if current == base || current == new => Some(new),
            () if new == base => Some(current),
            () => None,
        };
        let merged = part(base.0, new.0, current.0).zip(part(base.1, new.1, current.1));
        let entry = |(content, meta)| Some(file(content, meta));
        let (result, class) = merge(&entry(base), &entry(new), &entry(current));
        assert_eq!(result, entry(merged.unwrap_or(current)), "{base:?} {new:?} {current:?}");
        let conflict = merged.is_none() && current != new && current != base;
        assert_eq!(class == Some(Class::Conflict), conflict, "{base:?} {new:?} {current:?}");
    }
}

#[test]
fn every_combination_of_types_with_children() {
    let with = |meta, content| dir(meta, [("a", file(content, 0))]);
    let kinds = [
        None,
        Some(file(1, 0)),
        Some(file(2, 0)),
        Some(file(1, 1)),
        Some(link(1)),
        Some(link(2)),
        Some(dir(0, [])),
        Some(with(0, 1)),
        Some(with(0, 2)),
        Some(with(2, 1)),
        Some(dir(0, [("a", other()), ("b", link(1))])),
        Some(other()),
    ];
    for base in &kinds {
        for new in &kinds {
            for current in &kinds {
                let [b, n, c] = [base, new, current].map(at_x);
                let shown = || format!("B {base:?}\nN {new:?}\nC {current:?}");
                let plan = decide(&b, &n, &c);
                let after = outcome(&plan, &c);
                assert_eq!(decide(&b, &n, &after).changes, [], "{}", shown());
                let special = |etc: &Snapshot| flat(etc).values().any(|leaf| leaf.content == Content::Other);
                if b == c && ![&b, &n].into_iter().any(special) {
                    assert_eq!(after, n, "{}", shown());
                }
                let (base, after) = (flat(&b), flat(&after));
                for (path, leaf) in flat(&c) {
                    if base.get(&path) != Some(&leaf) && leaf.content == Content::Other {
                        assert_eq!(after.get(&path), Some(&leaf), "{path}\n{}", shown());
                    } else if base.get(&path).map(|before| &before.content) != Some(&leaf.content) {
                        assert_eq!(
                            after.get(&path).map(|now| &now.content),
                            Some(&leaf.content),
                            "{path}\n{}",
                            shown()
                        );
                    }
                }
                // If both sides changed the type differently, N's version is saved.
                let kinds = [&b, &n, &c].map(|etc| etc.root.children.get(&b"x"[..]).map(|entry| &entry.leaf.content));
                let files = |side: Option<&Content>| matches!(side, Some(Content::File { .. } | Content::Symlink(_)));
                if kinds[2] != kinds[0]
                    && kinds[2] != kinds[1]
                    && kinds[0] != kinds[1]
                    && files(kinds[1])
                    && kinds[2] != Some(&Content::Other)
                {
                    assert!(plan.aside.contains_key(&Bytes::from("x")), "{}", shown());
                }
            }
        }
    }
}

fn paths(etc: &Snapshot) -> Vec<String> {
    flat(etc).keys().skip(1).map(Bytes::to_string).collect()
}

fn classes(plan: &Plan) -> Vec<(String, Class)> {
    plan.decisions.iter().map(|decision| (decision.path.to_string(), decision.class)).collect()
}

#[test]
fn a_removed_directory_is_kept_for_its_local_entries() {
    let base = etc([("d", dir(0, [("theirs", file(1, 0)), ("sub", dir(0, [("more", file(1, 0))]))]))]);
    let current =
        etc([("d", dir(0, [("theirs", file(1, 0)), ("ours", file(2, 0)), ("sub", dir(0, [("more", file(1, 0))]))]))]);
    let plan = decide(&base, &etc([]), &current);
    assert_eq!(paths(&outcome(&plan, &current)), ["d", "d/ours"]);
    assert_eq!(classes(&plan)[0], ("d".into(), Class::Updated));
    assert_eq!(paths(&outcome(&decide(&base, &etc([]), &base), &base)), [""; 0]);

    // N has a file with this name: the directory stays with all its entries.
    let new = etc([("d", file(3, 0))]);
    let plan = decide(&base, &new, &current);
    assert!(plan.changes.is_empty());
    assert_eq!((plan.decisions[0].class, plan.aside.contains_key(&Bytes::from("d"))), (Class::Conflict, true));
    let plan = decide(&base, &new, &base);
    assert_eq!(outcome(&plan, &base), new);
}

#[test]
fn a_directory_whose_own_mode_changed_is_local() {
    let tree = |mode| etc([("d", dir(mode, [("a", file(1, 0)), ("sub", dir(0, [("b", file(1, 0))]))]))]);
    // N has another type of entry: the whole local version stays.
    for new in [etc([("d", file(3, 0))]), etc([("d", link(1))]), etc([("d", other())])] {
        let plan = decide(&tree(0), &new, &tree(2));
        assert!(plan.changes.is_empty(), "{plan:?}");
        assert_eq!(classes(&plan)[0], ("d".into(), Class::Conflict));
        assert!(classes(&plan)[1..].iter().all(|(_, class)| *class == Class::Local));
    }
    // N has no entry: the directory stays with its changed mode, and its unchanged entries are removed.
    let plan = decide(&tree(0), &etc([]), &tree(2));
    assert_eq!(outcome(&plan, &tree(2)), etc([("d", dir(2, []))]));
    assert_eq!(classes(&plan)[0], ("d".into(), Class::Conflict));
    // A special file of N does not replace an unchanged directory either.
    assert!(decide(&tree(0), &etc([("d", other())]), &tree(0)).changes.is_empty());
}

#[test]
fn a_second_node_image_replaces_the_defaults_of_the_first() {
    let base = || vec![("changed", file(1, 0)), ("back", file(1, 0)), ("dropped", file(1, 0)), ("mode", file(1, 0))];
    let first = etc([
        ("changed", file(2, 0)),
        ("back", file(2, 0)),
        ("mode", file(2, 0)),
        ("added", file(1, 0)),
        ("only-first", dir(0, [("unit", file(1, 0))])),
        ("edited", file(1, 0)),
    ]);
    let second = etc([
        ("changed", file(3, 0)),
        ("back", file(1, 0)),
        ("dropped", file(3, 0)),
        ("mode", file(3, 0)),
        ("added", file(3, 0)),
        ("edited", file(2, 0)),
    ]);
    let base = etc(base());
    let plan = decide(&base, &first, &base);
    let mut current = outcome(&plan, &base);
    assert_eq!(current, first);
    // Between the two merges, an administrator changes a mode and edits a file.
    current.root.children.insert(b"mode".to_vec(), file(2, 2));
    current.root.children.insert(b"edited".to_vec(), file(5, 0));
    let list: Defaults = serde_json::from_str(&serde_json::to_string(&plan.later()).unwrap()).unwrap();
    let mut rebased = base.clone();
    list.rebase(&mut rebased, &current);
    let again = Plan { earlier: list, ..decide(&rebased, &second, &current) };
    let mut expected = second.clone();
    expected.root.children.insert(b"mode".to_vec(), file(3, 2));
    expected.root.children.insert(b"edited".to_vec(), file(5, 0));
    assert_eq!(outcome(&again, &current), expected);
    assert_eq!((again.count(Class::Conflict), again.count(Class::Local)), (1, 0), "{:?}", again.decisions);
    // A second merge of the same node image changes nothing, and the next one compares with its defaults.
    let mut third = base.clone();
    again.later().rebase(&mut third, &expected);
    assert_eq!(decide(&third, &second, &expected).changes, []);
    assert_eq!(outcome(&decide(&third, &base, &expected), &expected).root.children[&b"changed"[..]], file(1, 0));
}

/// The same node image at the next boot conflicts with nothing, also where `strategy = "fail"`.
#[test]
fn an_edited_default_of_the_first_node_image_is_a_local_change() {
    let base = etc([("changed", file(1, 0)), ("mode", file(1, 0)), ("not-merged", file(1, 0))]);
    let image = etc([("added", file(2, 0)), ("changed", file(2, 0)), ("mode", file(1, 2)), ("not-merged", file(2, 0))]);
    let before = etc([("changed", file(1, 0)), ("mode", file(3, 0)), ("not-merged", file(1, 0))]);
    let later = decide(&base, &image, &before).later();
    // The last two are as a power cut in the merge leaves them.
    let current =
        etc([("added", file(3, 0)), ("changed", file(3, 0)), ("mode", file(3, 0)), ("not-merged", file(1, 0))]);
    let mut rebased = base;
    later.rebase(&mut rebased, &current);
    let plan = decide(&rebased, &image, &current);
    let class = |path: &str, class| (path.to_owned(), class);
    let expected = [
        class("added", Class::Local),
        class("changed", Class::Local),
        class("mode", Class::Updated),
        class("not-merged", Class::Updated),
    ];
    assert_eq!(classes(&plan), expected);
}

fn locked(obstacle: Obstacle, mut entry: Entry) -> Entry {
    entry.obstacle = Some(obstacle);
    entry
}

#[test]
fn entries_that_cannot_be_changed_are_kept_and_reported() {
    use Obstacle::{AppendOnly, Attribute, Immutable};
    let tree = |content, mode| etc([("f", file(content, 0)), ("d", dir(mode, [("a", file(content, 0))]))]);
    for obstacle in [Immutable, AppendOnly] {
        let mut current = tree(1, 0);
        current.root.children.insert(b"f".to_vec(), locked(obstacle, file(1, 0)));
        let plan = decide(&tree(1, 0), &tree(2, 0), &current);
        let changed: Vec<_> = plan.changes.iter().map(|change| change.path.to_string()).collect();
        assert_eq!(changed, ["d/a"]);
        assert_eq!((plan.decisions[1].class, &*plan.decisions[1].reason), (Class::Local, obstacle.reason()));
        // An entry without a change is not reported.
        assert_eq!(decide(&tree(1, 0), &tree(1, 0), &current).decisions, []);
    }
    // Entries of a locked directory cannot be added, replaced or removed, but entries of its subdirectories can change.
    let below = |content| dir(0, [("deep", file(content, 0))]);
    let with = |content, entries: Vec<(&'static str, Entry)>| {
        let mut all = vec![("a", file(content, 0)), ("sub", below(content))];
        all.extend(entries);
        all
    };
    let base = etc([("d", dir(0, with(1, vec![("gone", file(1, 0))])))]);
    let new = etc([("d", dir(2, with(2, vec![("new", below(1))])))]);
    let current = etc([("d", locked(Immutable, dir(0, with(1, vec![("gone", file(1, 0))]))))]);
    let plan = decide(&base, &new, &current);
    let changed: Vec<_> = plan.changes.iter().map(|change| change.path.to_string()).collect();
    assert_eq!(changed, ["d/sub/deep"]);
    assert_eq!(plan.count(Class::Local), 5, "{:?}", plan.decisions);
    // A directory that N removes is kept for its immutable file.
    let current = etc([("d", dir(0, [("a", locked(Immutable, file(1, 0))), ("b", file(1, 0))]))]);
    let base = etc([("d", dir(0, [("a", file(1, 0)), ("b", file(1, 0))]))]);
    let plan = decide(&base, &etc([]), &current);
    assert_eq!(paths(&outcome(&plan, &current)), ["d", "d/a"]);
    // Defaults with an attribute that the file system of /etc cannot hold.
    let new = etc([("f", locked(Attribute, file(2, 2))), ("dir", locked(Attribute, below(1)))]);
    let plan = decide(&etc([("f", file(1, 0))]), &new, &etc([("f", file(1, 0))]));
    assert!(
        plan.changes.is_empty() && plan.decisions.iter().all(|decision| decision.class == Class::Local),
        "{plan:?}"
    );
}

#[test]
fn new_entries_of_a_locally_deleted_directory_are_not_created() {
    let base = etc([("d", dir(0, [("a", file(1, 0)), ("b", file(1, 0))]))]);
    let new = etc([("d", dir(0, [("a", file(1, 0)), ("b", file(2, 0)), ("c", file(1, 0))]))]);
    let plan = decide(&base, &new, &etc([]));
    assert!(plan.changes.is_empty());
    let class = |path: &str, class| (path.to_owned(), class);
    let expected = [
        class("d", Class::Local),
        class("d/a", Class::Local),
        class("d/b", Class::Conflict),
        class("d/c", Class::Conflict),
    ];
    assert_eq!(classes(&plan), expected);
    assert_eq!(plan.aside.keys().map(Bytes::to_string).collect::<Vec<_>>(), ["d/b", "d/c"]);
}

#[test]
fn a_chmod_of_a_directory_survives() {
    let with = |number, content| etc([("d", dir(number, [("a", file(content, 0))]))]);
    let plan = decide(&with(0, 1), &with(0, 2), &with(2, 1));
    assert_eq!(outcome(&plan, &with(2, 1)), with(2, 2));
}

#[test]
fn kept_entries_are_not_listed_as_taken() {
    let base = etc([("d", dir(0, [("unchanged", file(1, 0)), ("z", file(1, 0))]))]);
    let current = etc([("d", dir(0, [("unchanged", file(1, 0)), ("z", file(3, 0))]))]);
    let plan = decide(&base, &etc([("d", file(2, 0))]), &current);
    assert!(plan.changes.is_empty() && plan.later().is_empty(), "{:?}", plan.later());
}

#[test]
fn mount_points_and_entries_below_them_are_kept() {
    let tree = |content| etc([("crypto", dir(0, [("policy", file(content, 0))]))]);
    let plan = decide(&tree(1), &tree(2), &etc([("crypto", other())]));
    assert!(plan.changes.is_empty() && plan.aside.is_empty());
    assert!(plan.decisions.iter().all(|decision| decision.class == Class::Local));
}

#[test]
fn system_state_is_kept_in_the_root_of_etc_only() {
    for name in ["passwd", "shadow-", "machine-id", "ld.so.cache"] {
        assert!(
            decide(&etc([(name, file(1, 0))]), &etc([(name, file(2, 0))]), &etc([(name, file(1, 0))]))
                .changes
                .is_empty()
        );
        assert!(decide(&etc([]), &etc([(name, file(2, 0))]), &etc([])).changes.is_empty());
        let below = |content| etc([("pam.d", dir(0, [(name, file(content, 0))]))]);
        assert_eq!(decide(&below(1), &below(2), &below(1)).changes.len(), 1);
    }
}

#[test]
fn an_older_selinux_policy_stays_for_the_next_boot() {
    let tree = |policies: &[(&'static str, u8)]| {
        let files: Vec<_> = policies.iter().map(|(name, content)| (*name, file(*content, 0))).collect();
        etc([("selinux", dir(0, [("targeted", dir(0, [("policy", dir(0, files))]))]))])
    };
    let after = |base: &[_], new: &[_], current: &[_]| {
        outcome(&decide(&tree(base), &tree(new), &tree(current)), &tree(current))
    };
    let old = [("policy.33", 1)];
    assert_eq!(after(&old, &[("policy.34", 2)], &old), tree(&[("policy.33", 1), ("policy.34", 2)]));
    // A policy of a newer version would be loaded instead of the node image's, so it is not kept.
    assert_eq!(after(&old, &[("policy.32", 2)], &old), tree(&[("policy.32", 2)]));
    assert_eq!(after(&old, &[("policy.33", 2)], &old), tree(&[("policy.33", 2)]));
    assert_eq!(after(&old, &[], &old), tree(&[]));
    assert_eq!(after(&[("policy.kern", 1)], &[("policy.34", 2)], &[("policy.kern", 1)]), tree(&[("policy.34", 2)]));
    // A locally removed policy stays removed.
    assert_eq!(after(&old, &[("policy.34", 2)], &[]), tree(&[("policy.34", 2)]));
    let plan = decide(&tree(&old), &tree(&[("policy.34", 2)]), &tree(&old));
    assert_eq!(plan.count(Class::Local), 1);
}

#[test]
fn json_preserves_a_plan() {
    let plan = decide(
        &etc([("a", file(1, 0)), ("l", link(1))]),
        &etc([("a", file(2, 2)), ("l", link(2))]),
        &etc([("a", file(1, 0)), ("l", link(3))]),
    );
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    assert!(refuse_conflicts(&plan).unwrap_err().to_string().contains("/etc/l"));
}
