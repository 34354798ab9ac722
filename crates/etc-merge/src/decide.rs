//! The decisions of the three-way merge, as a pure function without side effects. [`decide`] has the table.

use std::collections::{BTreeMap, BTreeSet};

use super::name::Bytes;
use super::plan::{Change, Class, Decision, Origin, Plan};
use super::snapshot::{Content, Entry, Leaf, Meta, Obstacle, Snapshot};
use selinux_labels::policy_format;

/// Files in which the system keeps its own state. The merge does not change them: systemd-sysusers creates users, and
/// ldconfig writes the cache.
const SYSTEM_STATE: [&[u8]; 17] = [
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

/// Decides the merge of `base` (B, the old defaults), `new` (N, the new defaults) and `current` (C, the content of
/// `/etc`).
///
/// | case | result | class |
/// |---|---|---|
/// | C = B | N; a directory is removed only if no local entry is left in it | updated |
/// | C ≠ B, N = B | C | local |
/// | C = N | C | converged |
/// | all differ | C; content and metadata are merged separately, so a changed content of one side and a changed owner or mode of the other are both taken | conflict, or updated |
/// | C absent, B present | absent | local, or conflict if N ≠ B |
/// | B absent, C and N differ | C | conflict |
/// | the types of C and N differ, C ≠ B | C | conflict |
/// | C is special or a mount point | C | local |
/// | C would change, but is immutable or append-only, or `/etc` cannot hold N's attributes | C | local |
/// | N has another type of entry, C is a directory with local entries | C with all its entries | conflict |
/// | the system's own state (`passwd`, `machine-id`, …) | C | local |
/// | C = B, a binary SELinux policy, and N has only newer format versions of it | C | local |
///
/// Directories are merged entry by entry; their own metadata are merged like those of a file. N's entries below a path
/// that is not a directory in the result are not created. Special files of N are never created.
pub fn decide(base: &Snapshot, new: &Snapshot, current: &Snapshot) -> Plan {
    let mut walk = Walk::default();
    walk.entry(&Bytes::default(), Some(&base.root), Some(&new.root), Some(&current.root), Parent::Directory);
    let mut plan = walk.plan;
    plan.changes = walk.removals;
    plan.changes.append(&mut walk.rest);
    plan.decisions.sort_by(|one, other| one.path.cmp(&other.path));
    plan
}

/// The parent of a path in the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parent {
    /// A directory.
    Directory,
    /// Another type of entry, or missing, because of a local change.
    Missing,
    /// A mount point, a special file, or an entry below one.
    Foreign,
    /// A directory whose entries cannot be added, replaced or removed.
    Locked(Obstacle),
    /// A directory that is kept with all its entries, although the node image has another type of entry.
    Kept,
}

/// The decision on one entry, with the class and the reason to report.
enum Verdict {
    /// All sides are equal.
    Same,
    /// Keep the current entry.
    Keep(Class, &'static str),
    /// Take the entry of the new tree, or remove the current one.
    Take(&'static str),
    /// Write an entry with parts of both sides; [`Origin`] tells where its content is.
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
    /// Decides on `path` and everything below it. Returns true if the result has an entry at `path`.
    fn entry(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>, parent: Parent) -> bool {
        let verdict = verdict(path, leaf(base), leaf(new), current, parent);
        let obstacle = obstacle(&verdict, new, current, parent);
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
        if was_directory && !stays_directory && self.keep_if_not_empty(path, base, new, current) {
            return true;
        }
        if let Some((class, reason)) = class {
            self.record(path, class, reason, new);
        }
        let present = result.is_some();
        let is_new = result.as_ref().map(|leaf| &leaf.content) == leaf(new).map(|leaf| &leaf.content);
        let is_converged = class.is_some_and(|(class, _)| class == Class::Converged);
        // Local content with only the node image's metadata is not a default of the node image.
        if is_new && (result.as_ref() != leaf(current) || is_converged) {
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
        let below = match parent {
            Parent::Foreign => Parent::Foreign,
            _ if leaf(current).is_some_and(|leaf| leaf.content == Content::Other) => Parent::Foreign,
            _ if !stays_directory && obstacle.is_some() => Parent::Foreign,
            _ if !stays_directory => Parent::Missing,
            Parent::Kept => Parent::Kept,
            _ if was_directory && leaf(new).is_some_and(|leaf| !leaf.is_directory()) => Parent::Kept,
            _ => current.and_then(|entry| entry.obstacle).map_or(Parent::Directory, Parent::Locked),
        };
        self.children(path, base, new, current, below);
        present
    }

    /// Decides on the entries of a directory that the node image removes or replaces by another type of entry. Returns
    /// true if a local entry is left in it, so that the directory must be kept.
    fn keep_if_not_empty(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>) -> bool {
        let before = (self.removals.len(), self.rest.len(), self.plan.decisions.len());
        let (aside, taken) = (self.plan.aside.clone(), self.plan.taken.clone());
        if !self.children(path, base, None, current, Parent::Directory) {
            return false;
        }
        if new.is_none() {
            let reason = "removed in the node image, kept for the local entries in it";
            self.record(path, Class::Updated, reason, None);
            return true;
        }
        // The node image's entry cannot be created, so removing the other entries has no benefit.
        self.removals.truncate(before.0);
        self.rest.truncate(before.1);
        self.plan.decisions.truncate(before.2);
        (self.plan.aside, self.plan.taken) = (aside, taken);
        let reason = "not a directory in the node image, but local entries are left in it";
        self.record(path, Class::Conflict, reason, new);
        self.children(path, base, None, current, Parent::Kept)
    }

    /// Decides on all entries of the directory `path`. Returns true if the result has any of them.
    fn children(&mut self, path: &Bytes, base: Side<'_>, new: Side<'_>, current: Side<'_>, parent: Parent) -> bool {
        let sides = [base, new, current].map(|side| side.map(|entry| &entry.children));
        let names: BTreeSet<&Vec<u8>> = sides.iter().flatten().flat_map(|children| children.keys()).collect();
        let mut left = false;
        for name in names {
            let [base, new, current] = sides.map(|side: Option<&BTreeMap<Vec<u8>, Entry>>| side?.get(name));
            if leaf(base) == leaf(current) && new.is_none() && is_older_policy(&path.join(name), sides[1]) {
                // On a disk, the next boot of the booted system uses this /etc. That system may not support the newer
                // version, and an enforcing boot stops if systemd can load no policy.
                self.record(&path.join(name), Class::Local, "the next boot of the booted system may need it", None);
                left = true;
                continue;
            }
            left |= self.entry(&path.join(name), base, new, current, parent);
        }
        left
    }

    fn record(&mut self, path: &Bytes, class: Class, reason: &str, new: Side<'_>) {
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

/// Returns true if `path` is a binary SELinux policy, `selinux/TYPE/policy/policy.NN`, and `beside`, the entries of its
/// directory in N, have a newer format version. systemd loads the newest version that the system supports.
fn is_older_policy(path: &Bytes, beside: Option<&BTreeMap<Vec<u8>, Entry>>) -> bool {
    let parts: Vec<&[u8]> = path.0.split(|byte| *byte == b'/').collect();
    let [b"selinux", _, b"policy", name] = parts[..] else { return false };
    let newest = beside.into_iter().flat_map(BTreeMap::keys).filter_map(|name| policy_format(name)).max();
    policy_format(name).is_some() && policy_format(name) < newest
}

fn leaf<'a>(side: Side<'a>) -> Option<&'a Leaf> {
    side.map(|entry| &entry.leaf)
}

/// Returns the reason why the merge cannot carry out `verdict`, if there is one.
fn obstacle(verdict: &Verdict, new: Side<'_>, current: Side<'_>, parent: Parent) -> Option<&'static str> {
    let after = match verdict {
        Verdict::Same | Verdict::Keep(..) => return None,
        Verdict::Take(_) => leaf(new),
        Verdict::Merge(leaf, ..) => Some(leaf),
    };
    let is_directory = |side: Option<&Leaf>| side.is_some_and(Leaf::is_directory);
    if let Some(obstacle) = current.and_then(|entry| entry.obstacle) {
        return Some(obstacle.reason());
    }
    match parent {
        // The owner, mode and attributes of a directory change in place.
        Parent::Locked(obstacle) if !(is_directory(leaf(current)) && is_directory(after)) => {
            return Some(obstacle.reason_inside());
        }
        _ => {}
    }
    let new = new.filter(|new| after.is_some_and(|after| after.meta.xattrs == new.leaf.meta.xattrs))?;
    new.obstacle.map(Obstacle::reason)
}

/// Decides on one entry by the table of [`decide`].
fn verdict(path: &Bytes, base: Option<&Leaf>, new: Option<&Leaf>, current: Side<'_>, parent: Parent) -> Verdict {
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
    if parent == Parent::Foreign {
        return Verdict::Keep(Local, "below an entry that the merge does not change");
    }
    if parent == Parent::Kept {
        return Verdict::Keep(Local, "in a directory that is kept, although it is not a directory in the node image");
    }
    if current == new {
        return Verdict::Keep(Converged, "the same as in the node image");
    }
    if SYSTEM_STATE.contains(&path.0.as_slice()) {
        return Verdict::Keep(Local, "the system's own state");
    }
    if parent == Parent::Missing {
        // C has no entry here either, because C's parent is not a directory.
        return if base == new {
            Verdict::Keep(Local, "removed here with its directory")
        } else {
            Verdict::Keep(Conflict, "changed in the node image, but its directory was removed here")
        };
    }
    if special(new) {
        return Verdict::Keep(Conflict, "a special file in the node image; the merge does not create special files");
    }
    if current == base {
        return Verdict::Take(match (current, new) {
            (None, _) => "new in the node image",
            (_, None) => "removed in the node image",
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
                _ => "changed here, removed in the node image",
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
            "a different type of entry here and in the node image"
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

/// Merges one value. Returns `None` if both sides changed it in different ways.
fn three_way<'a, T: PartialEq>(base: &'a T, new: &'a T, current: &'a T) -> Option<&'a T> {
    if current == base || current == new {
        Some(new)
    } else if new == base {
        Some(current)
    } else {
        None
    }
}
