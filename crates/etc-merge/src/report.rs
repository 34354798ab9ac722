//! What was done to `/etc`, for people and for the status document.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::name::Bytes;
use super::plan::{Class, Decision, Plan};

/// An entry on which something was not done, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotDone {
    /// Relative to `/etc`.
    pub path: Bytes,
    /// In a few words.
    pub reason: String,
}

/// How a merge went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Acts that are done, by this call or by an earlier one.
    pub applied: usize,
    /// Acts that were not done, because somebody changed the entry meanwhile.
    pub skipped: Vec<NotDone>,
    /// Entries whose security label could not be set.
    pub unlabelled: usize,
    /// How many decisions there are of each class.
    pub counts: BTreeMap<Class, usize>,
    /// Every decision.
    pub decisions: Vec<Decision>,
    /// Where the node image's versions of conflicting entries are.
    pub aside_dir: PathBuf,
}

impl Report {
    pub(super) fn new(plan: &Plan, aside_dir: &Path) -> Self {
        Self {
            applied: 0,
            skipped: Vec::new(),
            unlabelled: 0,
            counts: Class::ALL.into_iter().map(|class| (class, plan.count(class))).collect(),
            decisions: plan.decisions.clone(),
            aside_dir: aside_dir.to_owned(),
        }
    }
}

impl fmt::Display for Report {
    /// One line of counts, then what an administrator should know of: conflicts and what was skipped.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = self.counts.iter().map(|(class, count)| format!("{count} {class}")).collect();
        write!(out, "/etc: {}", counts.join(", "))?;
        for Decision { path, reason, .. } in self.decisions.iter().filter(|decision| decision.class == Class::Conflict)
        {
            write!(out, "\nconflict: /etc/{path}: {reason}")?;
            let aside = self.aside_dir.join(path.as_path());
            if aside.symlink_metadata().is_ok() {
                write!(out, "; kept the local one, the node image's is {}", aside.display())?;
            } else {
                out.write_str("; kept as it is")?;
            }
        }
        for NotDone { path, reason } in &self.skipped {
            write!(out, "\nleft alone: /etc/{path}: {reason}")?;
        }
        if self.unlabelled > 0 {
            write!(
                out,
                "\n{} entries could not be given their security label yet, which is tried again when a new policy is loaded; \
                 else run restorecon on /etc",
                self.unlabelled
            )?;
        }
        Ok(())
    }
}

/// How an undo went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoReport {
    /// Entries that are as they were.
    pub restored: usize,
    /// Entries that were changed since and stay.
    pub kept: Vec<NotDone>,
    /// Entries that could not be restored.
    pub failed: Vec<NotDone>,
    /// Entries whose old security label could not be set.
    pub unlabelled: usize,
    /// Damaged lines of the journal: labels and times of as many entries are not restored.
    #[serde(default)]
    pub damaged: usize,
}

impl fmt::Display for UndoReport {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "/etc: {} entries are as they were", self.restored)?;
        for NotDone { path, reason } in &self.kept {
            write!(out, "\nkept: /etc/{path}: {reason}")?;
        }
        for NotDone { path, reason } in &self.failed {
            write!(out, "\nnot undone: /etc/{path}: {reason}")?;
        }
        if self.unlabelled > 0 {
            write!(out, "\n{} entries could not be given their old security label", self.unlabelled)?;
        }
        if self.damaged > 0 {
            write!(out, "\n{} lines of the undo journal are damaged or missing", self.damaged)?;
        }
        Ok(())
    }
}
