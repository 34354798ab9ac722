//! Results of a merge and of its undo, for users and for the status document.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::name::Bytes;
use super::plan::{Class, Decision, Plan};

/// An entry that was not changed, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDone {
    /// Relative to `/etc`.
    pub path: Bytes,
    /// The reason, as a phrase for users.
    pub reason: String,
}

/// Result of a merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Number of changes that are complete, by this call or an earlier one.
    pub applied: usize,
    /// Changes that were not made, because another process changed the entry meanwhile.
    pub skipped: Vec<NotDone>,
    /// Number of entries whose SELinux label could not be set.
    pub unlabelled: usize,
    /// Number of decisions of each class.
    pub counts: BTreeMap<Class, usize>,
    /// All decisions.
    pub decisions: Vec<Decision>,
    /// Directory with the node image's versions of conflicting entries.
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
    /// Writes one line of counts, then one line for each conflict and each skipped change.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = self.counts.iter().map(|(class, count)| format!("{count} {class}")).collect();
        write!(out, "/etc: {}", counts.join(", "))?;
        for Decision { path, reason, .. } in self.decisions.iter().filter(|decision| decision.class == Class::Conflict)
        {
            write!(out, "\nconflict: /etc/{path}: {reason}")?;
            let aside = self.aside_dir.join(path.as_path());
            if aside.symlink_metadata().is_ok() {
                write!(out, "; kept the local version, saved the node image's as {}", aside.display())?;
            } else {
                out.write_str("; kept the local version")?;
            }
        }
        for NotDone { path, reason } in &self.skipped {
            write!(out, "\nnot changed: /etc/{path}: {reason}")?;
        }
        if self.unlabelled > 0 {
            write!(
                out,
                "\n{} entries do not have their SELinux label yet; the agent sets the labels after it has loaded a new policy, \
                 otherwise run restorecon on /etc",
                self.unlabelled
            )?;
        }
        Ok(())
    }
}

/// Result of an undo.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UndoReport {
    /// Number of restored entries.
    pub restored: usize,
    /// Entries that another process changed after the merge. They are kept.
    pub kept: Vec<NotDone>,
    /// Entries that could not be restored.
    pub failed: Vec<NotDone>,
    /// Number of entries whose old SELinux label could not be set.
    pub unlabelled: usize,
    /// Number of damaged lines in the journal. Labels and times of that many entries are not restored.
    pub damaged: usize,
}
