//! Listing of a tree, file by file, to compare the results of the two sides.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Writes one line per entry below `usr`: path, mode with type, owner, content or target, attributes.
/// `lib/modules` is left out.
pub fn write(usr: &Path, to: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(to).with_context(|| format!("writing {}", to.display()))?);
    // The directory behind /proc/self/fd, not the link.
    directory(&usr.join("."), Path::new(""), &mut out)?;
    out.flush()?;
    Ok(())
}

fn directory(dir: &Path, name: &Path, out: &mut impl Write) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = name.join(entry.file_name());
        if name == Path::new("lib/modules") {
            continue;
        }
        let (path, meta) = (entry.path(), entry.metadata()?);
        let content = if meta.is_file() {
            let mut hash = Sha256::new();
            std::io::copy(&mut File::open(&path)?, &mut Writer(&mut hash))?;
            hex::encode(hash.finalize())
        } else if meta.is_symlink() {
            format!("-> {}", fs::read_link(&path)?.as_os_str().as_bytes().escape_ascii())
        } else {
            String::new()
        };
        let shown = name.as_os_str().as_bytes().escape_ascii();
        writeln!(out, "{shown} {:o} {}:{} {content} {}", meta.mode(), meta.uid(), meta.gid(), attributes(&path)?)?;
        if meta.is_dir() {
            directory(&path, &name, out)?;
        }
    }
    Ok(())
}

/// Extended attributes, without overlayfs's own.
fn attributes(path: &Path) -> Result<String> {
    let mut names = Vec::with_capacity(4096);
    rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names))?;
    let mut shown = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = Vec::with_capacity(4096);
        rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value))?;
        shown.push(format!("{}={}", name.escape_ascii(), hex::encode(value)));
    }
    shown.sort();
    Ok(shown.join(" "))
}

struct Writer<'a>(&'a mut Sha256);

impl Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Some lines that only one of two listings has; `None` when they are equal.
pub fn difference(ours: &str, theirs: &str) -> Option<String> {
    if ours == theirs {
        return None;
    }
    let only = |some: &str, other: &str, whose: &str| {
        let other: std::collections::HashSet<&str> = other.lines().collect();
        let lines = some.lines().filter(|line| !other.contains(line)).take(5);
        lines.map(|line| format!("{whose} {line}\n")).collect::<String>()
    };
    Some(only(ours, theirs, "ours:     ") + &only(theirs, ours, "incumbent:"))
}
