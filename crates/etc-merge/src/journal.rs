//! The undo record: the plan, what each act replaced, and how far it got.
//!
//! A directory of mode 0700 with `plan.json` (written first), `journal` (one JSON line before each act)
//! and `saved/NUMBER` (content that an act replaces). Its own writes are ordered so that whatever was
//! done to `/etc` can be undone from it, wherever the agent is killed. It is synced before the first act, which costs
//! nothing on the tmpfs on which it normally lies.

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

/// What an act replaced, apart from what the plan says already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Prior {
    /// The act's number in the plan.
    pub change: usize,
    /// The security label.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub label: Option<Bytes>,
    /// Seconds and nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mtime: Option<(i64, i64)>,
}

pub(super) struct Record {
    directory: PathBuf,
    pub plan: Plan,
    /// Acts that were begun, by number.
    pub begun: BTreeMap<usize, Prior>,
    /// Lines of the journal that cannot be read or, after [`Record::complete`], are missing.
    pub damaged: usize,
    journal: File,
}

const PLAN: &str = "plan.json";
const JOURNAL: &str = "journal";
const SAVED: &str = "saved";

impl Record {
    /// Opens the record of this plan, making it if there is none.
    ///
    /// # Errors
    /// When there is a record of another plan: that one must be finished or undone first.
    pub fn create(directory: &Path, plan: &Plan) -> Result<Self> {
        if let Some(existing) = Self::load(directory)? {
            if existing.plan != *plan {
                bail!("{} is the record of another merge; finish or undo that one first", directory.display());
            }
            if existing.damaged > 0 {
                bail!("the undo record {} is damaged; undo that merge first", directory.display());
            }
            return Ok(existing);
        }
        let making = || format!("making the undo record {}", directory.display());
        failpoint::hit(Point::EtcRecord, "").with_context(making)?;
        DirBuilder::new().recursive(true).mode(0o700).create(directory.join(SAVED)).with_context(making)?;
        // Left over from an undo that was killed at its very end.
        match std::fs::remove_file(directory.join(JOURNAL)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(making),
            _ => {}
        }
        let text = serde_json::to_vec(plan).with_context(making)?;
        let home = support::directory::Directory::ensure(directory).with_context(making)?;
        home.write_atomic(PLAN, 0o600, &text).with_context(making)?;
        Self::load(directory)?.with_context(making)
    }

    /// Opens the record, if there is one. Damaged lines of the journal do not hide the others; see [`Record::complete`].
    pub fn load(directory: &Path) -> Result<Option<Self>> {
        let reading = || format!("reading the undo record {}", directory.display());
        let text = match std::fs::read(directory.join(PLAN)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.with_context(reading)?,
        };
        let plan: Plan = serde_json::from_slice(&text).with_context(reading)?;
        let lines = match std::fs::read(directory.join(JOURNAL)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            other => other.with_context(reading)?,
        };
        let whole = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let (mut begun, mut damaged) = (BTreeMap::new(), 0);
        for line in lines[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Prior>(line) {
                Ok(prior) if prior.change < plan.changes.len() => drop(begun.insert(prior.change, prior)),
                _ => damaged += 1,
            }
        }
        let journal = OpenOptions::new().append(true).create(true).mode(0o600).open(directory.join(JOURNAL));
        let journal = journal.with_context(reading)?;
        // Killed while writing a line: its act was not begun.
        journal.set_len(whole as u64).with_context(reading)?;
        Ok(Some(Self { directory: directory.to_owned(), plan, begun, damaged, journal }))
    }

    /// Adds the acts that damaged or missing lines may have been about: those whose former content is saved or was none.
    /// Labels and times of these are lost. An act that was not begun is left alone by the undo, as its entry is the former
    /// one.
    pub fn complete(&mut self) {
        let was_file = |change: &Change| matches!(&change.before, Some(Leaf { content: Content::File { .. }, .. }));
        let changes = self.plan.changes.iter().enumerate().filter(|(number, _)| !self.begun.contains_key(number));
        let (saved, others): (Vec<_>, Vec<_>) = changes
            .filter(|(number, change)| !was_file(change) || self.saved_path(*number).exists())
            .map(|(number, change)| (number, was_file(change)))
            .partition(|(_, was_file)| *was_file);
        // Killed between saving and writing the line: one act, which was not begun.
        self.damaged = self.damaged.max(saved.len().saturating_sub(1));
        if self.damaged == 0 {
            return;
        }
        for (number, _) in saved.into_iter().chain(others) {
            self.begun.insert(number, Prior { change: number, label: None, mtime: None });
        }
    }

    /// Records that an act is about to be done. What it replaces must have been saved before.
    pub fn begin(&mut self, prior: Prior) -> Result<()> {
        let mut line = serde_json::to_vec(&prior).context("writing the undo record")?;
        line.push(b'\n');
        let end = self.journal.metadata().context("writing the undo record")?.len();
        if let Err(error) = self.append(&line) {
            // No room for all of it: take the part back, or a later line would follow it.
            let _ = self.journal.set_len(end);
            return Err(error).context("writing the undo record");
        }
        self.begun.insert(prior.change, prior);
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> std::io::Result<()> {
        failpoint::hit(Point::EtcBegin, "")?;
        #[cfg(any(test, feature = "failpoints"))]
        let line = {
            let (half, rest) = line.split_at(line.len() / 2);
            self.journal.write_all(half)?;
            failpoint::hit(Point::EtcJournal, "")?;
            rest
        };
        self.journal.write_all(line)
    }

    /// Waits until the record is on the disk, should it lie on one.
    pub fn sync(&self) -> Result<()> {
        super::staging::sync(self.journal.as_fd()).context("writing the undo record to the disk")
    }

    /// A new file for content that act `number` replaces.
    pub fn save(&self, number: usize) -> Result<File> {
        let path = self.saved_path(number);
        failpoint::hit(Point::EtcSave, "")
            .and_then(|()| OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path))
            .with_context(|| format!("saving it to {}", path.display()))
    }

    /// The content that act `number` replaced.
    pub fn saved(&self, number: usize) -> Result<File> {
        let path = self.saved_path(number);
        File::open(&path).with_context(|| format!("reading what was saved in {}", path.display()))
    }

    fn saved_path(&self, number: usize) -> PathBuf {
        self.directory.join(SAVED).join(number.to_string())
    }

    /// Ends the record: everything is as it was. The plan goes first, so that a kill in here leaves
    /// no record rather than a wrong one.
    pub fn forget(self) -> Result<()> {
        let removing = || format!("removing the undo record {}", self.directory.display());
        failpoint::hit(Point::EtcRecordEnd, "").with_context(removing)?;
        std::fs::remove_file(self.directory.join(PLAN)).with_context(removing)?;
        sweep(&self.directory)
    }
}

/// Removes what is left of a record that has ended: copies of files that not everybody may read.
pub fn sweep(directory: &Path) -> Result<()> {
    if directory.symlink_metadata().is_err() {
        return Ok(());
    }
    failpoint::hit(Point::EtcRecordRemove, "")
        .and_then(|()| std::fs::remove_dir_all(directory))
        .with_context(|| format!("removing the undo record {}", directory.display()))
}
