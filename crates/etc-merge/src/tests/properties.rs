//! Properties of the decisions for all trees.

use proptest::prelude::*;

use super::*;

const NAMES: [&str; 4] = ["a", "a-b", "b", "c"];

fn entry() -> impl Strategy<Value = Entry> {
    let leaf = prop_oneof![
        6 => (0u8..3, 0u8..3).prop_map(|(content, meta)| file(content, meta)),
        2 => (0u8..2).prop_map(link),
        1 => Just(other()),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        (0u8..3, prop::collection::btree_map(prop::sample::select(&NAMES[..]), inner, 0..4))
            .prop_map(|(meta, children)| dir(meta, children))
    })
}

fn root() -> impl Strategy<Value = Snapshot> {
    (0u8..3, prop::collection::btree_map(prop::sample::select(&NAMES[..]), entry(), 0..5))
        .prop_map(|(meta, children)| Snapshot { root: dir(meta, children) })
}

/// Replaces parts of `base` by parts of `other`; `choices` decide for each part.
fn edit(base: &Entry, other: &Entry, choices: &mut impl Iterator<Item = u8>) -> Entry {
    let mut edited = base.clone();
    if choices.next() == Some(0) {
        edited.leaf.meta = other.leaf.meta.clone();
    }
    let names: Vec<Vec<u8>> = base.children.keys().chain(other.children.keys()).cloned().collect();
    for name in names {
        let chosen = match (choices.next().unwrap_or(9), base.children.get(&name), other.children.get(&name)) {
            (0..2, _, theirs) => theirs.cloned(),
            (_, Some(ours), Some(theirs)) if ours.leaf.is_directory() && theirs.leaf.is_directory() => {
                Some(edit(ours, theirs, choices))
            }
            (_, ours, _) => ours.cloned(),
        };
        match chosen {
            Some(entry) => drop(edited.children.insert(name, entry)),
            None => drop(edited.children.remove(&name)),
        }
    }
    edited
}

/// Generates three trees that have most of their entries in common.
pub(super) fn families() -> impl Strategy<Value = [Snapshot; 3]> {
    let choices = || prop::collection::vec(0u8..6, 40);
    (root(), root(), root(), choices(), choices()).prop_map(|(base, one, two, first, second)| {
        let new = Snapshot { root: edit(&base.root, &one.root, &mut first.into_iter()) };
        let current = Snapshot { root: edit(&base.root, &two.root, &mut second.into_iter()) };
        [base, new, current]
    })
}

/// Generates such trees without devices, sockets and fifos, which a merge leaves alone.
fn families_without_special() -> impl Strategy<Value = [Snapshot; 3]> {
    families().prop_map(|family| family.map(|tree| Snapshot { root: without_special(tree.root) }))
}

fn without_special(mut entry: Entry) -> Entry {
    entry.children.retain(|_, child| child.leaf.content != Content::Other);
    entry.children = entry.children.into_iter().map(|(name, child)| (name, without_special(child))).collect();
    entry
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_second_merge_changes_nothing([base, new, current] in families()) {
        let after = outcome(&decide(&base, &new, &current), &current);
        prop_assert_eq!(decide(&base, &new, &after).changes, []);
    }

    #[test]
    fn an_unmodified_etc_becomes_the_new_one([base, new, _] in families_without_special()) {
        let plan = decide(&base, &new, &base);
        prop_assert_eq!(outcome(&plan, &base), new);
        prop_assert_eq!(plan.count(Class::Updated), plan.decisions.len());
    }

    /// Each image is merged in a boot of the same base, as on a disk.
    #[test]
    fn an_untouched_etc_follows_a_chain_of_node_images([base, one, two] in families_without_special()) {
        let (mut current, mut list) = (base.clone(), Defaults::default());
        for new in [&one, &two, &one, &base, &two] {
            let mut rebased = base.clone();
            list.rebase(&mut rebased, &current);
            let plan = Plan { earlier: list, ..decide(&rebased, new, &current) };
            current = outcome(&plan, &current);
            prop_assert_eq!(&current, new);
            list = plan.later();
        }
    }

    #[test]
    fn local_changes_are_never_lost([base, new, current] in families()) {
        let after = flat(&outcome(&decide(&base, &new, &current), &current));
        let (base, current) = (flat(&base), flat(&current));
        for (path, leaf) in &current {
            let before = base.get(path);
            if before.is_none_or(|before| before.content != leaf.content) {
                prop_assert_eq!(&after[path].content, &leaf.content, "{}", path);
            }
            if before.is_none_or(|before| before.meta != leaf.meta) {
                prop_assert_eq!(&after[path].meta, &leaf.meta, "{}", path);
            }
        }
        for path in base.keys().filter(|path| !current.contains_key(path)) {
            prop_assert!(!after.contains_key(path), "{} was deleted here", path);
        }
    }

    #[test]
    fn every_path_that_differs_has_one_decision([base, new, current] in families()) {
        let plan = decide(&base, &new, &current);
        let sides = [flat(&base), flat(&new), flat(&current)];
        let mut expected: Vec<&Bytes> = sides.iter().flat_map(BTreeMap::keys).collect();
        expected.sort();
        expected.dedup();
        expected.retain(|path| sides[0].get(*path) != sides[1].get(*path) || sides[1].get(*path) != sides[2].get(*path));
        let decided: Vec<&Bytes> = plan.decisions.iter().map(|decision| &decision.path).collect();
        let missing: Vec<_> = expected.iter().filter(|path| !decided.contains(path)).collect();
        prop_assert!(missing.is_empty(), "{:?}", missing);
        prop_assert!(decided.is_sorted_by(|one, other| one < other), "a path has two decisions");
    }

    #[test]
    fn decisions_do_not_depend_on_siblings([base, new, current] in families()) {
        let whole = decide(&base, &new, &current);
        for name in NAMES {
            let only = |etc: &Snapshot| {
                let mut etc = etc.clone();
                etc.root.children.retain(|other, _| other == name.as_bytes());
                etc
            };
            let alone = decide(&only(&base), &only(&new), &only(&current));
            let here = |path: &Bytes| path.as_path().starts_with(name);
            let of = |plan: &Plan| {
                let changes: Vec<_> = plan.changes.iter().filter(|change| here(&change.path)).cloned().collect();
                let decisions: Vec<_> = plan.decisions.iter().filter(|one| here(&one.path)).cloned().collect();
                let aside: Vec<_> = plan.aside.keys().filter(|path| here(path)).cloned().collect();
                (changes, decisions, aside)
            };
            prop_assert_eq!(of(&whole), of(&alone));
        }
    }
}
