//! The journal of finished layers, one line per layer. With it, a killed pull continues without fetching them again.
//!
//! The journal only saves downloads. Objects are trusted because of their checksums. If a journaled layer's objects are
//! missing, the pull reads the layer again.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Mutex;

use super::object::ObjectId;
use support::lock;

/// The wanted set for which a layer was read. An entry for one scope does not count for a wider one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// True for all objects that the booted repo lacks; else for those that the booted commit lacks, except those below
    /// `/usr/lib/modules`.
    complete: bool,
    /// The booted commit, or `-`.
    booted: String,
}

impl Scope {
    /// Returns the scope of a pull.
    pub fn new(complete: bool, booted_commit: Option<ObjectId>) -> Self {
        Self { complete, booted: booted_commit.map_or("-".to_owned(), |commit| commit.to_string()) }
    }

    fn line(&self, digest: &str) -> String {
        format!("{digest} {} {}", if self.complete { "complete" } else { "delta" }, self.booted)
    }
}

/// The journal of one node store, open for appending.
#[derive(Debug)]
pub struct LayerJournal {
    file: Mutex<File>,
    known: HashSet<String>,
}

impl LayerJournal {
    /// Opens or creates the journal at `path`. A last line without a newline was cut by a kill and is ignored.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let known = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect();
        if !text.is_empty() && !text.ends_with('\n') {
            file.write_all(b"\n")?;
        }
        Ok(Self { file: Mutex::new(file), known })
    }

    /// Returns true if an earlier run read this layer for this scope, or completely.
    pub fn has(&self, digest: &str, scope: &Scope) -> bool {
        let wider = Scope { complete: true, ..scope.clone() };
        self.known.contains(&scope.line(digest)) || self.known.contains(&wider.line(digest))
    }

    /// Returns true if an earlier run read this layer for this scope, or all of it except kernel modules.
    pub fn has_most(&self, digest: &str, scope: &Scope) -> bool {
        self.has(digest, &Scope { complete: false, ..scope.clone() })
    }

    /// Records a layer whose wanted objects are all stored, in one write.
    pub fn add(&self, digest: &str, scope: &Scope) -> io::Result<()> {
        let line = format!("{}\n", scope.line(digest));
        lock(&self.file).write_all(line.as_bytes())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entries_count_for_their_scope_and_cut_lines_are_ignored() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("layers");
        let of = |byte, complete| Scope::new(complete, Some(ObjectId([byte; 32])));
        let (delta, complete) = (of(1, false), of(1, true));
        let journal = LayerJournal::open(&path).unwrap();
        journal.add("sha256:a", &delta).unwrap();
        journal.add("sha256:b", &complete).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"sha256:c delta 020202").unwrap();
        let journal = LayerJournal::open(&path).unwrap();
        assert!(journal.has("sha256:a", &delta) && !journal.has("sha256:a", &complete));
        assert!(journal.has_most("sha256:a", &complete) && !journal.has_most("sha256:c", &complete));
        assert!(journal.has("sha256:b", &delta) && journal.has("sha256:b", &complete));
        assert!(!journal.has("sha256:a", &of(2, false)));
        assert!(!journal.has("sha256:c", &of(2, false)), "a cut line is ignored");
        journal.add("sha256:d", &delta).unwrap();
        assert!(LayerJournal::open(&path).unwrap().has("sha256:d", &delta), "a cut line does not damage the next one");
    }
}
