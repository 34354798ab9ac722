//! A plan as a unified diff, as `git apply` and `patch -p1` take it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use rustix::fs::AtFlags;
use similar::TextDiff;

use super::name::Bytes;
use super::place::Place;
use super::plan::{Change, Class, Origin, Plan};
use super::snapshot::{Content, Leaf};

/// Files above this size are not compared line by line, in bytes.
const LONGEST: u64 = 4 << 20;

/// What applying `plan` would do to `etc_dir`, as a unified diff with git's extended headers. Conflicts, of which
/// nothing is applied, follow as comments: what taking the node image's version would change.
///
/// The content of what not everybody may read (by its own mode, on either side, or by that of a directory above) is left
/// out, unless `secrets`: such a file is only named. Binary files are named, too.
///
/// # Errors
/// When something cannot be read. Nothing is ever written. A file that changed since the plan was made is shown as it
/// is now.
pub fn diff(plan: &Plan, new_dir: BorrowedFd<'_>, etc_dir: BorrowedFd<'_>, secrets: bool) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for change in &plan.changes {
        let sides = Sides { new: new_dir, etc: etc_dir, secrets };
        sides.change(change, &mut out).with_context(|| format!("comparing /etc/{}", change.path))?;
    }
    for decision in plan.of(Class::Conflict) {
        writeln!(out, "# conflict: /etc/{}: {}; it is kept as it is", decision.path, decision.reason)?;
        if plan.aside.contains_key(&decision.path) {
            let sides = Sides { new: new_dir, etc: etc_dir, secrets };
            let not_taken = sides.conflict(&decision.path);
            let text = not_taken.with_context(|| format!("comparing /etc/{}", decision.path))?;
            for line in text.split_inclusive(|byte| *byte == b'\n') {
                out.extend_from_slice(b"# ");
                out.extend_from_slice(line);
            }
        }
    }
    Ok(out)
}

struct Sides<'a> {
    new: BorrowedFd<'a>,
    etc: BorrowedFd<'a>,
    secrets: bool,
}

impl Sides<'_> {
    fn change(&self, change: &Change, out: &mut Vec<u8>) -> Result<()> {
        let (before, after) = (change.before.as_ref(), change.after.as_ref());
        let from = match change.content {
            Origin::New => self.new,
            Origin::Current => self.etc,
        };
        self.pair(&change.path, (before, self.etc), (after, from), out)
    }

    /// What taking the node image's version would change.
    fn conflict(&self, path: &Bytes) -> Result<Vec<u8>> {
        let look = |dir| Place::find(dir, path)?.map_or(Ok(None), |place| place.look());
        let (current, new): (Option<Leaf>, Option<Leaf>) = (look(self.etc)?, look(self.new)?);
        let mut out = Vec::new();
        self.pair(path, (current.as_ref(), self.etc), (new.as_ref(), self.new), &mut out)?;
        Ok(out)
    }

    fn pair(
        &self,
        path: &Bytes,
        (before, old_dir): (Option<&Leaf>, BorrowedFd<'_>),
        (after, new_dir): (Option<&Leaf>, BorrowedFd<'_>),
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if before == after {
            return Ok(());
        }
        if let (Some(one), Some(two)) = (before, after)
            && std::mem::discriminant(&one.content) != std::mem::discriminant(&two.content)
        {
            self.pair(path, (before, old_dir), (None, new_dir), out)?;
            return self.pair(path, (None, old_dir), (after, new_dir), out);
        }
        let (a, b) = (quoted("a/etc", path), quoted("b/etc", path));
        if [before, after].into_iter().flatten().any(Leaf::is_directory) {
            // git knows no directories.
            let shown = |side: Option<&Leaf>| side.map_or_else(|| "absent".to_owned(), mode);
            writeln!(out, "# directory {b}: {} becomes {}", shown(before), shown(after))?;
            return owner_and_attributes(before, after, out);
        }
        writeln!(out, "diff --git {a} {b}")?;
        match (before, after) {
            (None, Some(leaf)) => writeln!(out, "new file mode {}", mode(leaf))?,
            (Some(leaf), None) => writeln!(out, "deleted file mode {}", mode(leaf))?,
            (Some(one), Some(two)) if mode(one) != mode(two) => {
                writeln!(out, "old mode {}\nnew mode {}", mode(one), mode(two))?;
            }
            _ => {}
        }
        owner_and_attributes(before, after, out)?;
        let content = |side: Option<&Leaf>| side.map(|leaf| leaf.content.clone());
        if content(before) == content(after) {
            return Ok(());
        }
        if !self.secrets && (self.is_secret(path, before, old_dir)? || self.is_secret(path, after, new_dir)?) {
            writeln!(out, "# content not shown: not everybody may read it; --secrets shows it")?;
            return Ok(());
        }
        let (Some(old), Some(new)) = (text(path, before, old_dir)?, text(path, after, new_dir)?) else {
            writeln!(out, "Binary files {a} and {b} differ")?;
            return Ok(());
        };
        let null = || "/dev/null".to_owned();
        let names = (before.map_or_else(null, |_| a), after.map_or_else(null, |_| b));
        let lines = TextDiff::from_lines(old.as_slice(), new.as_slice());
        lines.unified_diff().context_radius(3).header(&names.0, &names.1).to_writer(out)?;
        Ok(())
    }

    /// Whether not everybody may read it.
    fn is_secret(&self, path: &Bytes, leaf: Option<&Leaf>, dir: BorrowedFd<'_>) -> Result<bool> {
        let Some(leaf) = leaf else { return Ok(false) };
        if matches!(leaf.content, Content::File { .. }) && leaf.meta.mode & 0o004 == 0 {
            return Ok(true);
        }
        let above = path.0.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| &path.0[..end]);
        for parent in above {
            let stat = rustix::fs::statat(dir.as_fd(), parent, AtFlags::SYMLINK_NOFOLLOW);
            // A directory that the plan only makes has its mode in the plan; the file's own counts then.
            if stat.is_ok_and(|stat| stat.st_mode & 0o001 == 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What git knows nothing of, as lines that it skips.
fn owner_and_attributes(before: Option<&Leaf>, after: Option<&Leaf>, out: &mut Vec<u8>) -> Result<()> {
    if let (Some(Leaf { meta: one, .. }), Some(Leaf { meta: two, .. })) = (before, after) {
        if (one.uid, one.gid) != (two.uid, two.gid) {
            writeln!(out, "# owner {}:{} becomes {}:{}", one.uid, one.gid, two.uid, two.gid)?;
        }
        if one.xattrs != two.xattrs {
            writeln!(out, "# extended attributes change")?;
        }
    }
    Ok(())
}

/// The mode as git writes it, except that git knows only 644 and 755.
fn mode(leaf: &Leaf) -> String {
    match leaf.content {
        Content::Symlink(_) => "120000".to_owned(),
        _ => format!("{:06o}", leaf.raw_mode()),
    }
}

/// What is compared; `None` for what has no lines.
fn text(path: &Bytes, leaf: Option<&Leaf>, dir: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    match leaf.map(|leaf| &leaf.content) {
        None | Some(Content::Directory | Content::Other) => Ok(Some(Vec::new())),
        Some(Content::Symlink(target)) => Ok(Some(target.0.clone())),
        Some(Content::File { size, .. }) => {
            if *size > LONGEST {
                return Ok(None);
            }
            let mut content = Vec::new();
            let place = Place::find(dir, path)?.context("its directory is gone")?;
            place.open()?.take(LONGEST + 1).read_to_end(&mut content).context("reading it")?;
            // git's own rule: a NUL in the first 8000 bytes.
            Ok((!content.iter().take(8000).any(|byte| *byte == 0)).then_some(content))
        }
    }
}

/// A name for the diff, quoted as git quotes names that hold anything unusual.
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
