//! A plan as a unified diff for `git apply` and `patch -p1`.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use similar::{DiffOp, DiffTag};

use super::name::Bytes;
use super::place::Place;
use super::plan::{Change, Class, Origin, Plan};
use super::snapshot::{Content, Leaf};
use super::undo::is_nested;

/// Size in bytes above which files are not compared line by line.
const MAX_DIFF_SIZE: u64 = 4 << 20;

/// Returns the changes of `plan` to `etc_dir` as a unified diff with git's extended headers, which `git apply` accepts.
/// Lines that begin with `#` describe changes that git cannot express: directories, owners, exact modes and attributes.
/// Conflicts follow as such lines, with the diff from the current version to the node image's.
///
/// Binary files are shown by name only. Unless `secrets` is true, the same applies to files that not all users may
/// read, because of the mode of either version or of a directory above.
///
/// # Errors
/// A file cannot be read. A file that changed since the plan was made is shown with its current content.
pub fn diff(plan: &Plan, new_dir: BorrowedFd<'_>, etc_dir: BorrowedFd<'_>, secrets: bool) -> Result<Vec<u8>> {
    Ok(show(plan, &Sides { new: new_dir, etc: etc_dir, secrets })?.0)
}

/// Returns the diff, and the paths whose content it does not show.
pub(super) fn show(plan: &Plan, sides: &Sides<'_>) -> Result<(Vec<u8>, BTreeSet<Bytes>)> {
    let mut entries = Vec::new();
    for change in &plan.changes {
        let shown = sides.change(change).with_context(|| format!("cannot compare /etc/{}", change.path))?;
        entries.push((&change.path, shown));
    }
    let mut hidden: BTreeSet<Bytes> =
        entries.iter().filter(|(_, shown)| shown.is_hidden).map(|(path, _)| (*path).clone()).collect();
    // git removes a directory with its last file. It keeps one without files, which blocks a file with that name.
    let has_patch_below = |path: &Bytes| {
        let is_below = |other: &Bytes| other.0.len() > path.0.len() && is_nested(other, path);
        entries.iter().any(|(other, shown)| is_below(other) && !shown.patch.is_empty())
    };
    let removed = plan.changes.iter().filter(|change| change.after.is_none());
    let removed = removed.filter(|change| change.before.as_ref().is_some_and(Leaf::is_directory));
    hidden.extend(removed.map(|change| &change.path).filter(|path| !has_patch_below(path)).cloned());
    // git looks up a new file before it removes the link above it, and accepts only that the lookup finds nothing. A link
    // that leads to itself gives another error.
    let created = plan.changes.iter().filter(|change| change.before.is_none()).map(|change| &change.path);
    hidden.extend(created.filter(|path| is_behind_a_link_loop(path, sides.etc)).cloned());
    // A file that replaces a directory, or the reverse, needs the changes of all entries in that directory.
    for (path, shown) in &mut entries {
        if !shown.patch.is_empty() && hidden.iter().any(|other| is_nested(other, path)) {
            shown.patch.clear();
            writeln!(shown.notes, "# /etc/{path}: not shown: it depends on an entry that is not shown")?;
            hidden.insert(path.clone());
        }
    }
    let mut out = Vec::new();
    for (_, shown) in entries {
        out.extend(shown.notes);
        out.extend(shown.patch);
    }
    for decision in plan.of(Class::Conflict) {
        writeln!(out, "# conflict: /etc/{}: {}; the local version is kept", decision.path, decision.reason)?;
        if plan.aside.contains_key(&decision.path) {
            let not_taken = sides.conflict(&decision.path);
            let shown = not_taken.with_context(|| format!("cannot compare /etc/{}", decision.path))?;
            for line in [shown.notes, shown.patch].concat().split_inclusive(|byte| *byte == b'\n') {
                out.extend_from_slice(if line.starts_with(b"# ") { b"" } else { b"# " });
                out.extend_from_slice(line);
            }
        }
    }
    Ok((out, hidden))
}

/// One entry of the diff.
#[derive(Default)]
struct Shown {
    /// Lines that git ignores. They precede the patch, because git ends a header at the first unknown line.
    notes: Vec<u8>,
    /// The part that git can express; may be empty.
    patch: Vec<u8>,
    /// True if the content must not or cannot be shown.
    is_hidden: bool,
}

/// The directories to compare.
pub(super) struct Sides<'a> {
    pub new: BorrowedFd<'a>,
    pub etc: BorrowedFd<'a>,
    /// True to show files that not all users may read.
    pub secrets: bool,
}

type Side<'a> = (Option<&'a Leaf>, BorrowedFd<'a>);

impl Sides<'_> {
    fn change(&self, change: &Change) -> Result<Shown> {
        let from = match change.content {
            Origin::New => self.new,
            Origin::Current => self.etc,
        };
        self.pair(&change.path, (change.before.as_ref(), self.etc), (change.after.as_ref(), from))
    }

    /// Compares the current version of a conflicting entry with the node image's.
    fn conflict(&self, path: &Bytes) -> Result<Shown> {
        let look = |dir| Place::find(dir, path)?.map_or(Ok(None), |place| place.look());
        let (current, new): (Option<Leaf>, Option<Leaf>) = (look(self.etc)?, look(self.new)?);
        self.pair(path, (current.as_ref(), self.etc), (new.as_ref(), self.new))
    }

    fn pair(&self, path: &Bytes, old: Side<'_>, new: Side<'_>) -> Result<Shown> {
        let mut shown = Shown::default();
        if old.0 == new.0 {
            return Ok(shown);
        }
        note(path, old.0, new.0, &mut shown.notes)?;
        // git does not track directories: treat them as missing.
        let [old, new] = [old, new].map(|(leaf, dir)| (leaf.filter(|leaf| !leaf.is_directory()), dir));
        if old.0.map(|leaf| (mode(leaf), &leaf.content)) == new.0.map(|leaf| (mode(leaf), &leaf.content)) {
            return Ok(shown);
        }
        if !self.secrets && (self.is_secret(path, old.0, old.1)? || self.is_secret(path, new.0, new.1)?) {
            writeln!(shown.notes, "# /etc/{path}: content not shown: not all users may read it; --secrets shows it")?;
            shown.is_hidden = true;
            return Ok(shown);
        }
        let (Some(before), Some(after)) = (text(path, old.0, old.1)?, text(path, new.0, new.1)?) else {
            writeln!(shown.notes, "# binary files a/etc/{path} and b/etc/{path} differ")?;
            shown.is_hidden = true;
            return Ok(shown);
        };
        match (old.0, new.0) {
            (Some(one), Some(two)) if is_link(one) != is_link(two) => {
                patch(path, (Some(one), &before), (None, b""), &mut shown.patch)?;
                patch(path, (None, b""), (Some(two), &after), &mut shown.patch)?;
            }
            (one, two) => patch(path, (one, &before), (two, &after), &mut shown.patch)?,
        }
        Ok(shown)
    }

    /// Returns true if the mode of the file or of a directory above it excludes other users.
    fn is_secret(&self, path: &Bytes, leaf: Option<&Leaf>, dir: BorrowedFd<'_>) -> Result<bool> {
        let Some(leaf) = leaf else { return Ok(false) };
        if matches!(leaf.content, Content::File { .. }) && leaf.meta.mode & 0o004 == 0 {
            return Ok(true);
        }
        let above = path.0.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| &path.0[..end]);
        for parent in above {
            let stat = rustix::fs::statat(dir.as_fd(), parent, AtFlags::SYMLINK_NOFOLLOW);
            // A directory that the plan creates does not exist in `/etc`. Only the mode of the file counts then.
            if stat.is_ok_and(|stat| stat.st_mode & 0o001 == 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Writes one change in git's format.
fn patch(path: &Bytes, old: (Option<&Leaf>, &[u8]), new: (Option<&Leaf>, &[u8]), out: &mut Vec<u8>) -> Result<()> {
    let (a, b) = (quoted("a/etc", path), quoted("b/etc", path));
    writeln!(out, "diff --git {a} {b}")?;
    match (old.0, new.0) {
        (None, Some(leaf)) => writeln!(out, "new file mode {}", mode(leaf))?,
        (Some(leaf), None) => writeln!(out, "deleted file mode {}", mode(leaf))?,
        (Some(one), Some(two)) if mode(one) != mode(two) => {
            writeln!(out, "old mode {}\nnew mode {}", mode(one), mode(two))?;
        }
        _ => {}
    }
    if old.1 == new.1 {
        return Ok(());
    }
    // A tab ends a name with spaces, for git and for patch.
    let tab = if path.0.contains(&b' ') { "\t" } else { "" };
    let name =
        |leaf: Option<&Leaf>, name: &str| leaf.map_or_else(|| "/dev/null".to_owned(), |_| format!("{name}{tab}"));
    let [before, after] = [old.1, new.1].map(|text| text.split_inclusive(|byte| *byte == b'\n').collect::<Vec<_>>());
    let (from, to) = (name(old.0, &a), name(new.0, &b));
    writeln!(out, "--- {from}\n+++ {to}")?;
    let ops = similar::capture_diff_slices(similar::Algorithm::Myers, &before, &after);
    similar::group_diff_ops(ops, 3).iter().try_for_each(|group| hunk(group, &before, &after, out))
}

/// Writes a hunk. Works on bytes, because content need not be UTF-8.
fn hunk(group: &[DiffOp], old: &[&[u8]], new: &[&[u8]], out: &mut Vec<u8>) -> Result<()> {
    let (Some(first), Some(last)) = (group.first(), group.last()) else { return Ok(()) };
    // Lines count from 1. For an empty range, the number is that of the line before it.
    let range = |start: usize, end: usize| format!("{},{}", start + usize::from(end > start), end - start);
    let removed = range(first.old_range().start, last.old_range().end);
    let added = range(first.new_range().start, last.new_range().end);
    writeln!(out, "@@ -{removed} +{added} @@")?;
    for op in group {
        let (old_lines, new_lines) = (&old[op.old_range()], &new[op.new_range()]);
        let sides: [(u8, &[&[u8]]); 2] = match op.tag() {
            DiffTag::Equal => [(b' ', old_lines), (b' ', &[])],
            _ => [(b'-', old_lines), (b'+', new_lines)],
        };
        for (sign, lines) in sides {
            for line in lines {
                out.push(sign);
                out.extend_from_slice(line);
                if !line.ends_with(b"\n") {
                    out.extend_from_slice(b"\n\\ No newline at end of file\n");
                }
            }
        }
    }
    Ok(())
}

/// Writes changes that git cannot express, as lines that it ignores.
fn note(path: &Bytes, before: Option<&Leaf>, after: Option<&Leaf>, out: &mut Vec<u8>) -> Result<()> {
    let shown =
        |side: Option<&Leaf>| side.map_or_else(|| "absent".to_owned(), |leaf| format!("{:06o}", leaf.raw_mode()));
    if [before, after].into_iter().flatten().any(Leaf::is_directory) {
        writeln!(out, "# directory /etc/{path}: {} becomes {}", shown(before), shown(after))?;
    } else if before.map(Leaf::raw_mode) != after.map(Leaf::raw_mode)
        && [before, after].into_iter().flatten().any(|leaf| format!("{:06o}", leaf.raw_mode()) != mode(leaf))
    {
        writeln!(out, "# mode of /etc/{path}: {} becomes {}", shown(before), shown(after))?;
    }
    let (Some(Leaf { meta: one, .. }), Some(Leaf { meta: two, .. })) = (before, after) else { return Ok(()) };
    if (one.uid, one.gid) != (two.uid, two.gid) {
        writeln!(out, "# owner of /etc/{path}: {}:{} becomes {}:{}", one.uid, one.gid, two.uid, two.gid)?;
    }
    if one.xattrs != two.xattrs {
        writeln!(out, "# extended attributes of /etc/{path} change")?;
    }
    Ok(())
}

fn is_behind_a_link_loop(path: &Bytes, etc_dir: BorrowedFd<'_>) -> bool {
    rustix::fs::statat(etc_dir, path.as_path(), AtFlags::SYMLINK_NOFOLLOW).is_err_and(|error| error == Errno::LOOP)
}

fn is_link(leaf: &Leaf) -> bool {
    matches!(leaf.content, Content::Symlink(_))
}

/// Returns the mode in git's format, which for a file tells only if its owner may execute it.
fn mode(leaf: &Leaf) -> &'static str {
    match leaf.content {
        Content::Symlink(_) => "120000",
        _ if leaf.meta.mode & 0o100 != 0 => "100755",
        _ => "100644",
    }
}

/// Returns the text to compare; `None` for a binary or large file.
fn text(path: &Bytes, leaf: Option<&Leaf>, dir: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    match leaf.map(|leaf| &leaf.content) {
        None | Some(Content::Directory | Content::Other) => Ok(Some(Vec::new())),
        Some(Content::Symlink(target)) => Ok(Some(target.0.clone())),
        Some(Content::File { size, .. }) => {
            if *size > MAX_DIFF_SIZE {
                return Ok(None);
            }
            let mut content = Vec::new();
            let place = Place::find(dir, path)?.context("its directory is missing")?;
            place.open()?.take(MAX_DIFF_SIZE + 1).read_to_end(&mut content).context("cannot read it")?;
            // git's rule for binary files: a NUL in the first 8000 bytes.
            Ok((!content.iter().take(8000).any(|byte| *byte == 0)).then_some(content))
        }
    }
}

/// Returns a name for the diff. Quotes names with special characters as git does.
fn quoted(prefix: &str, path: &Bytes) -> String {
    let plain = |byte: &u8| matches!(byte, 0x20..=0x7e) && !matches!(byte, b'"' | b'\\');
    let slash = if path.0.is_empty() { "" } else { "/" };
    if path.0.iter().all(plain) {
        return format!("{prefix}{slash}{path}");
    }
    let mut name = format!("\"{prefix}{slash}");
    for byte in &path.0 {
        match byte {
            b'"' => name.push_str("\\\""),
            b'\\' => name.push_str("\\\\"),
            byte if plain(byte) => name.push(char::from(*byte)),
            byte => name.push_str(&format!("\\{byte:03o}")),
        }
    }
    name.push('"');
    name
}
