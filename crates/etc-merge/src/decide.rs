//! The three-way merge, as a pure function. The table stands at [`decide`]; the tests go through every
//! combination.

use std::collections::{BTreeMap, BTreeSet};

use super::name::Bytes;
use super::plan::{Change, Class, Decision, Origin, Plan};
use super::snapshot::{Content, Entry, Leaf, Meta, Obstacle, Snapshot};
use selinux_labels::policy_format;

/// Files in which the system keeps its own state. They stay as they are: users come from
/// systemd-sysusers, the cache from ldconfig.
const OWN_STATE: [&[u8]; 17] = [
    b"passwd",
    b"passwd-",
    b"group",
    b"group-",
    b"shadow",
    b"shadow-",
    b"gshadow",
    b"gshadow-",
    b"subuid",
    b"subuid-",
    b"subgid",
    b"subgid-",
    b"machine-id",
    b"hostname",
    b"resolv.conf",
    b"mtab",
    b"ld.so.cache",
];

/// Decides the merge of `base` (B, the old defaults), `new` (N, the new defaults) and `current` (C,
/// what is in `/etc`).
///
/// | case | result | class |
/// |---|---|---|
/// | C = B | N; a directory goes only when nothing local is left in it | updated |
/// | C ≠ B, N = B | C | local |
/// | C = N | C | converged |
/// | all differ | C; content and metadata are looked at apart, so that a change of one side to the content and of the other to owner or mode are both taken | conflict, or updated |
/// | C absent, B present | absent | local, or conflict if N ≠ B |
/// | B absent, C and N differ | C | conflict |
/// | kinds clash, C modified | C | conflict |
/// | C is special or a mount point | C | local |
/// | C would change, but is immutable or append-only, or cannot hold N's attributes | C | local |
/// | N has no directory, C has one with local changes | C with all below | conflict |
/// | the system's own state (`passwd`, `machine-id`, …) | C | local |
/// | C = B, an SELinux policy of which N has only newer versions of the format | C | local |
///
/// Directories are merged entry by entry, their own metadata like content. What is below a path that is
/// no directory in the result cannot come into being; it shares that path's fate. A special file in
/// N is never created.
///
/// Total, and without effects.
pub fn decide(base: &Snapshot, new: &Snapshot, current: &Snapshot) -> Plan {
    let mut walk = Walk::default();
    walk.entry(&Bytes::default(), Some(&base.root), Some(&new.root), Some(&current.root), Fate::Free);
    let mut plan = walk.plan;
    plan.changes = walk.removals;
    plan.changes.append(&mut walk.rest);
    plan.decisions.sort_by(|one, other| one.path.cmp(&other.path));
    plan
}

/// What the result above a path means for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The parent is a directory in the result.
    Free,
    /// The parent is kept as something else, or is gone, by local choice.
    NoParent,
    /// The parent is a mount point or a special file.
    Foreign,
    /// The parent is a directory in which nothing can be added, replaced or removed.
    Locked(Obstacle),
    /// The parent stays as it is, though the node image has no directory there.
    Kept,
}

/// What to do about one entry.
enum Verdict {
    Same,
    Keep(Class, &'static str),
    Take(&'static str),
    Merge(Leaf, Origin, &'static str),
}

#[derive(Default)]
struct Walk {
    plan: Plan,
    removals: Vec<Change>,
    rest: Vec<Change>,
}

type Side<'a> = Option<&'a Entry>;

impl Walk {
    /// Decides `path` and everything below; returns true if it is there in the result.
    fn entry(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>, fate: Fate) -> bool {
        let verdict = verdict(path, leaf(base), leaf(new), current, fate);
        let obstacle = obstacle(&verdict, new, current, fate);
        let verdict = obstacle.map_or(verdict, |reason| Verdict::Keep(Class::Local, reason));
        let class = match verdict {
            Verdict::Same => None,
            Verdict::Keep(class, reason) => Some((class, reason)),
            Verdict::Take(reason) | Verdict::Merge(_, _, reason) => Some((Class::Updated, reason)),
        };
        let (result, origin) = match verdict {
            Verdict::Same | Verdict::Keep(..) => (leaf(current).cloned(), Origin::Current),
            Verdict::Take(_) => (leaf(new).cloned(), Origin::New),
            Verdict::Merge(leaf, origin, _) => (Some(leaf), origin),
        };
        let was_directory = leaf(current).is_some_and(Leaf::is_directory);
        let stays_directory = result.as_ref().is_some_and(Leaf::is_directory);
        if was_directory && !stays_directory && self.dissolve(path, base, new, current) {
            return true;
        }
        if let Some((class, reason)) = class {
            self.note(path, class, reason, new);
        }
        let present = result.is_some();
        if result.as_ref() != leaf(current) || class.is_some_and(|(class, _)| class == Class::Converged) {
            self.plan.taken.0.insert(path.clone(), leaf(new).cloned());
        }
        if result.as_ref() != leaf(current) {
            let change = Change {
                path: path.clone(),
                before: leaf(current).cloned(),
                after: result,
                content: origin,
                label: None,
            };
            let list = if present { &mut self.rest } else { &mut self.removals };
            list.push(change);
        }
        if was_directory && !stays_directory {
            return present;
        }
        let below = match fate {
            Fate::Foreign => Fate::Foreign,
            _ if leaf(current).is_some_and(|leaf| leaf.content == Content::Other) => Fate::Foreign,
            _ if !stays_directory && obstacle.is_some() => Fate::Foreign,
            _ if !stays_directory => Fate::NoParent,
            Fate::Kept => Fate::Kept,
            _ if was_directory && leaf(new).is_some_and(|leaf| !leaf.is_directory()) => Fate::Kept,
            _ => current.and_then(|entry| entry.obstacle).map_or(Fate::Free, Fate::Locked),
        };
        self.children(path, base, new, current, below);
        present
    }

    /// A directory that the node image drops, or has another kind of entry for, gives way if nothing local is left in
    /// it. Returns true if it stays.
    fn dissolve(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>) -> bool {
        let before = (self.removals.len(), self.rest.len(), self.plan.decisions.len());
        let (aside, taken) = (self.plan.aside.clone(), self.plan.taken.clone());
        if !self.children(path, base, None, current, Fate::Free) {
            return false;
        }
        if new.is_none() {
            let reason = "dropped by the node image, kept for the local entries in it";
            self.note(path, Class::Updated, reason, None);
            return true;
        }
        // The node image's entry cannot be there: nothing is gained by removing the others.
        self.removals.truncate(before.0);
        self.rest.truncate(before.1);
        self.plan.decisions.truncate(before.2);
        (self.plan.aside, self.plan.taken) = (aside, taken);
        let reason = "the node image has no directory here, but local entries are left in it";
        self.note(path, Class::Conflict, reason, new);
        self.children(path, base, None, current, Fate::Kept)
    }

    /// Decides all entries below `path`; returns true if any is there in the result.
    fn children(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>, fate: Fate) -> bool {
        let sides = [base, new, current].map(|side| side.map(|entry| &entry.children));
        let names: BTreeSet<&Vec<u8>> = sides.iter().flatten().flat_map(|children| children.keys()).collect();
        let mut left = false;
        for name in names {
            let [base, new, current] = sides.map(|side: Option<&BTreeMap<Vec<u8>, Entry>>| side?.get(name));
            if leaf(base) == leaf(current) && new.is_none() && is_older_policy(&path.join(name), sides[1]) {
                // On a disk this /etc is the next boot's, too, and that is the booted system's, which may not know the
                // newer version: enforcing, without a policy that it can load, it would stop there.
                self.note(&path.join(name), Class::Local, "the booted system's next boot may need it", None);
                left = true;
                continue;
            }
            left |= self.entry(&path.join(name), base, new, current, fate);
        }
        left
    }

    fn note(&mut self, path: &Bytes, class: Class, reason: &str, new: Side<'_>) {
        let size = new.and_then(|entry| match &entry.leaf.content {
            Content::File { size, .. } => Some(*size),
            Content::Symlink(_) => Some(0),
            Content::Directory | Content::Other => None,
        });
        if let (Class::Conflict, Some(size)) = (class, size) {
            self.plan.aside.insert(path.clone(), size);
        }
        self.plan.decisions.push(Decision { path: path.clone(), class, reason: reason.to_owned() });
    }
}

/// Whether it is a binary SELinux policy, `selinux/TYPE/policy/policy.NN`, and one of a newer format is among those
/// beside it. The newest that is understood is what gets loaded.
fn is_older_policy(path: &Bytes, beside: Option<&BTreeMap<Vec<u8>, Entry>>) -> bool {
    let parts: Vec<&[u8]> = path.0.split(|byte| *byte == b'/').collect();
    let [b"selinux", _, b"policy", name] = parts[..] else { return false };
    let newest = beside.into_iter().flat_map(BTreeMap::keys).filter_map(|name| policy_format(name)).max();
    policy_format(name).is_some() && policy_format(name) < newest
}

fn leaf<'a>(side: Side<'a>) -> Option<&'a Leaf> {
    side.map(|entry| &entry.leaf)
}

/// Returns the reason why the entry cannot be changed as `verdict` says.
fn obstacle(verdict: &Verdict, new: Side<'_>, current: Side<'_>, fate: Fate) -> Option<&'static str> {
    let after = match verdict {
        Verdict::Same | Verdict::Keep(..) => return None,
        Verdict::Take(_) => leaf(new),
        Verdict::Merge(leaf, ..) => Some(leaf),
    };
    let is_directory = |side: Option<&Leaf>| side.is_some_and(Leaf::is_directory);
    if let Some(obstacle) = current.and_then(|entry| entry.obstacle) {
        return Some(obstacle.reason());
    }
    match fate {
        // The owner, mode and attributes of a directory change in place.
        Fate::Locked(obstacle) if !(is_directory(leaf(current)) && is_directory(after)) => {
            return Some(obstacle.reason_inside());
        }
        _ => {}
    }
    let new = new.filter(|new| after.is_some_and(|after| after.meta.xattrs == new.leaf.meta.xattrs))?;
    new.obstacle.map(Obstacle::reason)
}

/// One entry, by the table. `fate` says if its parent will be a directory.
fn verdict(path: &Bytes, base: Option<&Leaf>, new: Option<&Leaf>, current: Side<'_>, fate: Fate) -> Verdict {
    use Class::{Conflict, Converged, Local};
    let special = |side: Option<&Leaf>| side.is_some_and(|leaf| leaf.content == Content::Other);
    let obstacle = current.and_then(|entry| entry.obstacle);
    let current = leaf(current);
    if special(current) {
        return Verdict::Keep(Local, obstacle.map_or("a special file or a mount point", Obstacle::reason));
    }
    if base == new && new == current {
        return Verdict::Same;
    }
    if fate == Fate::Foreign {
        return Verdict::Keep(Local, "below an entry that the merge leaves alone");
    }
    if fate == Fate::Kept {
        return Verdict::Keep(Local, "in a directory that stays, though the node image has none here");
    }
    if current == new {
        return Verdict::Keep(Converged, "the same as in the node image");
    }
    if OWN_STATE.contains(&path.0.as_slice()) {
        return Verdict::Keep(Local, "the system's own state");
    }
    if fate == Fate::NoParent {
        // Nothing can be here; current is absent, since its parent is no directory either.
        return if base == new {
            Verdict::Keep(Local, "removed here with what is above it")
        } else {
            Verdict::Keep(Conflict, "changed in the node image, but its directory is gone here")
        };
    }
    if special(new) {
        return Verdict::Keep(Conflict, "a special file in the node image, which is never created");
    }
    if current == base {
        return Verdict::Take(match (current, new) {
            (None, _) => "new in the node image",
            (_, None) => "dropped by the node image",
            _ => "changed in the node image",
        });
    }
    if base == new {
        return Verdict::Keep(Local, if current.is_none() { "removed here" } else { "changed here" });
    }
    let (Some(base), Some(new), Some(current)) = (base, new, current) else {
        return Verdict::Keep(
            Conflict,
            match (base, current) {
                (None, _) => "added here and, differently, in the node image",
                (_, None) => "removed here, changed in the node image",
                _ => "changed here, dropped by the node image",
            },
        );
    };
    let content = three_way(&base.content, &new.content, &current.content);
    let meta = three_way(&base.meta, &new.meta, &current.meta);
    let same_kind = [new, current].iter().all(|leaf| kind(&leaf.content) == kind(&base.content));
    let (Some(content), Some(meta)) = (content.filter(|_| same_kind), meta) else {
        let reason = if same_kind {
            "changed here and, differently, in the node image"
        } else {
            "of different kinds here and in the node image"
        };
        return Verdict::Keep(Conflict, reason);
    };
    let merged = Leaf { content: content.clone(), meta: Meta::clone(meta) };
    if merged == *current {
        return Verdict::Keep(Local, "changed here");
    }
    let origin = if merged.content == current.content { Origin::Current } else { Origin::New };
    Verdict::Merge(merged, origin, "content and metadata merged from both sides")
}

fn kind(content: &Content) -> std::mem::Discriminant<Content> {
    std::mem::discriminant(content)
}

/// `None` when both sides changed it in different ways.
fn three_way<'a, T: PartialEq>(base: &'a T, new: &'a T, current: &'a T) -> Option<&'a T> {
    if current == base || current == new {
        Some(new)
    } else if new == base {
        Some(current)
    } else {
        None
    }
}
