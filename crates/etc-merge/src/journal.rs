//! The undo journal: the plan, the started changes and the content that they replace.
//!
//! It is a directory of mode 0700 with three parts: `plan.json` (written first), `journal` (one JSON line, written
//! before each change) and `saved/NUMBER` (the file content that change NUMBER replaces). The order of the writes
//! ensures that every change to `/etc` can be undone from the journal, wherever the agent is killed. The journal is
//! synced before the first change; on the tmpfs where it normally is, that takes no time.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::name::Bytes;
use super::plan::{Change, Plan};
use super::snapshot::{Content, Leaf};
use support::failpoint::{self, Point};
use support::{if_found, ignore_missing};

/// A line of the journal: the state before a change that is not in the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Prior {
    /// Index of the change in the plan.
    pub change: usize,
    /// The SELinux label.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub label: Option<Bytes>,
    /// Modification time in seconds and nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mtime: Option<(i64, i64)>,
}

/// An open undo journal.
pub(super) struct UndoJournal {
    directory: PathBuf,
    pub plan: Plan,
    /// Started changes by index.
    pub started: BTreeMap<usize, Prior>,
    /// Number of lines that cannot be parsed or, after [`UndoJournal::add_possibly_started`], are missing.
    pub damaged: usize,
    lines: File,
}

const PLAN: &str = "plan.json";
const JOURNAL: &str = "journal";
const SAVED: &str = "saved";
const WRITING: &str = "cannot write the undo journal";

impl UndoJournal {
    /// Opens the journal of `plan` in `directory`. Creates it if it is missing.
    ///
    /// # Errors
    /// The directory has the journal of another plan, or a damaged journal. That merge must be completed or undone
    /// first.
    pub fn create(directory: &Path, plan: &Plan) -> Result<Self> {
        if let Some(existing) = Self::load(directory)? {
            if existing.plan != *plan {
                bail!(
                    "{} is the undo journal of another merge; complete or undo that merge first",
                    directory.display()
                );
            }
            if existing.damaged > 0 {
                bail!("the undo journal {} is damaged; undo that merge first", directory.display());
            }
            return Ok(existing);
        }
        let making = || format!("cannot create the undo journal {}", directory.display());
        failpoint::hit(Point::EtcRecord, "").with_context(making)?;
        DirBuilder::new().recursive(true).mode(0o700).create(directory.join(SAVED)).with_context(making)?;
        // An undo that was killed at its end left this file.
        ignore_missing(std::fs::remove_file(directory.join(JOURNAL))).with_context(making)?;
        let text = serde_json::to_vec(plan).with_context(making)?;
        let home = support::directory::Directory::ensure(directory).with_context(making)?;
        home.write_atomic(PLAN, 0o600, &text).with_context(making)?;
        Self::load(directory)?.with_context(making)
    }

    /// Opens the journal in `directory`; `None` if it has none. Skips damaged lines; see
    /// [`UndoJournal::add_possibly_started`].
    pub fn load(directory: &Path) -> Result<Option<Self>> {
        let reading = || format!("cannot read the undo journal {}", directory.display());
        let Some(text) = if_found(std::fs::read(directory.join(PLAN))).with_context(reading)? else { return Ok(None) };
        let plan: Plan = serde_json::from_slice(&text).with_context(reading)?;
        let lines = if_found(std::fs::read(directory.join(JOURNAL))).with_context(reading)?.unwrap_or_default();
        let whole = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let (mut started, mut damaged) = (BTreeMap::new(), 0);
        for line in lines[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Prior>(line) {
                Ok(prior) if prior.change < plan.changes.len() => drop(started.insert(prior.change, prior)),
                _ => damaged += 1,
            }
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(directory.join(JOURNAL));
        let file = file.with_context(reading)?;
        // The agent was killed while it wrote the last line. It has not started that change.
        file.set_len(whole as u64).with_context(reading)?;
        Ok(Some(Self { directory: directory.to_owned(), plan, started, damaged, lines: file }))
    }

    /// Adds the changes that damaged or missing lines can belong to: those whose old content is saved, and those
    /// without content to save. Their labels and times are lost. If such a change was not started, its entry is still
    /// the old one, and the undo does not change it.
    pub fn add_possibly_started(&mut self) {
        let was_file = |change: &Change| matches!(&change.before, Some(Leaf { content: Content::File { .. }, .. }));
        let changes = self.plan.changes.iter().enumerate().filter(|(number, _)| !self.started.contains_key(number));
        let (saved, others): (Vec<_>, Vec<_>) = changes
            .filter(|(number, change)| !was_file(change) || self.saved_path(*number).exists())
            .map(|(number, change)| (number, was_file(change)))
            .partition(|(_, was_file)| *was_file);
        // One saved file without a line is normal: the agent was killed before it wrote the line and started the
        // change.
        self.damaged = self.damaged.max(saved.len().saturating_sub(1));
        if self.damaged == 0 {
            return;
        }
        for (number, _) in saved.into_iter().chain(others) {
            self.started.insert(number, Prior { change: number, label: None, mtime: None });
        }
    }

    /// Writes the line for a change that will be made next. The caller has saved the content that it replaces.
    pub fn start(&mut self, prior: Prior) -> Result<()> {
        let mut line = serde_json::to_vec(&prior).context(WRITING)?;
        line.push(b'\n');
        let end = self.lines.metadata().context(WRITING)?.len();
        if let Err(error) = self.append(&line) {
            // Part of the line may be written. Remove it, because the next line would be appended to it.
            let _ = self.lines.set_len(end);
            return Err(error).context(WRITING);
        }
        self.started.insert(prior.change, prior);
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> std::io::Result<()> {
        failpoint::hit(Point::EtcBegin, "")?;
        #[cfg(any(test, feature = "failpoints"))]
        let line = {
            let (half, rest) = line.split_at(line.len() / 2);
            self.lines.write_all(half)?;
            failpoint::hit(Point::EtcJournal, "")?;
            rest
        };
        self.lines.write_all(line)
    }

    /// Syncs the file system of the journal.
    pub fn sync(&self) -> Result<()> {
        super::staging::sync(self.lines.as_fd()).context("cannot sync the undo journal")
    }

    /// Creates the file for the content that change `number` replaces.
    pub fn save(&self, number: usize) -> Result<File> {
        let path = self.saved_path(number);
        failpoint::hit(Point::EtcSave, "")
            .and_then(|()| OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path))
            .with_context(|| format!("cannot save its content in {}", path.display()))
    }

    /// Opens the content that change `number` replaced.
    pub fn saved(&self, number: usize) -> Result<File> {
        let path = self.saved_path(number);
        File::open(&path).with_context(|| format!("cannot read its saved content {}", path.display()))
    }

    fn saved_path(&self, number: usize) -> PathBuf {
        self.directory.join(SAVED).join(number.to_string())
    }

    /// Removes the journal after a complete undo. Removes the plan first: without a plan, the rest does not count as a
    /// journal.
    pub fn end(self) -> Result<()> {
        let removing = || format!("cannot remove the undo journal {}", self.directory.display());
        failpoint::hit(Point::EtcRecordEnd, "").with_context(removing)?;
        std::fs::remove_file(self.directory.join(PLAN)).with_context(removing)?;
        remove_leftovers(&self.directory)
    }
}

/// Removes the rest of an ended journal. Its copies can be of files that not all users may read.
pub fn remove_leftovers(directory: &Path) -> Result<()> {
    if directory.symlink_metadata().is_err() {
        return Ok(());
    }
    failpoint::hit(Point::EtcRecordRemove, "")
        .and_then(|()| std::fs::remove_dir_all(directory))
        .with_context(|| format!("cannot remove the undo journal {}", directory.display()))
}
