//! The steps of a switch that change files and mounts. Each can be repeated, and undone at any point.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context as _;
use boot_config::mark;

use crate::agent::new_usr::{ETC, USR, USR_SOURCE, new_etc};
use crate::agent::state::{self, FileStep};
use crate::agent::{StateDir, UndoTree, storage};
use node_store::store::{NODE_IMAGE_REF, ObjectId};
use support::failpoint::{self, Point};

/// The result of an undo.
#[derive(Debug, Default)]
pub(in crate::agent) struct Undone {
    /// Entries kept deliberately, such as files changed since the switch, one line each.
    pub(in crate::agent) kept: Vec<String>,
    /// Failures to restore, one line each. The undo is incomplete if there are any.
    pub(in crate::agent) failed: Vec<String>,
}

impl Undone {
    /// Adds another result.
    pub(super) fn extend(&mut self, other: Self) {
        self.kept.extend(other.kept);
        self.failed.extend(other.failed);
    }
}

impl From<anyhow::Result<()>> for Undone {
    fn from(result: anyhow::Result<()>) -> Self {
        Self { kept: Vec::new(), failed: result.err().into_iter().map(|error| format!("{error:#}")).collect() }
    }
}

/// The input of the steps. Blocks.
#[derive(Clone)]
pub(super) struct FileSteps {
    pub(super) dir: StateDir,
    pub(super) tree: UndoTree,
}

/// A change of the ref of the node image in use.
#[derive(Clone, Copy)]
enum RefChange {
    Set(ObjectId),
    Remove,
}

impl FileSteps {
    /// Applies a step of the switch to `commit`. Returns the report of the merge of `/etc`.
    pub(super) fn apply(&self, step: FileStep, commit: ObjectId) -> anyhow::Result<Option<etc_merge::Report>> {
        match step {
            FileStep::Ref => self.change_ref(RefChange::Set(commit))?,
            FileStep::Marker => {
                self.dir.write(StateDir::PIVOTED, 0o644, mark::pivoted_text(Path::new("/"))?.as_bytes())?;
            }
            FileStep::Usr => self.expose()?,
            FileStep::Etc => return self.merge().map(Some),
        }
        Ok(None)
    }

    /// Undoes a step, and nothing if it was not applied.
    pub(super) fn undo(&self, step: FileStep) -> Undone {
        match step {
            FileStep::Ref => self.change_ref(RefChange::Remove).into(),
            FileStep::Marker => self.dir.remove(StateDir::PIVOTED).into(),
            FileStep::Usr => withdraw(),
            FileStep::Etc => self.restore(),
        }
    }

    fn change_ref(&self, change: RefChange) -> anyhow::Result<()> {
        let store = storage::of(&self.dir, &self.tree.delta)?;
        let (detail, changed) = match change {
            RefChange::Set(commit) => ("set", failpoint::hit(Point::Ref, "set").and_then(|()| store.set_ref(&commit))),
            RefChange::Remove => ("remove", failpoint::hit(Point::Ref, "remove").and_then(|()| store.remove_ref())),
        };
        changed.with_context(|| format!("cannot {detail} the ref {NODE_IMAGE_REF} in {}", store.repo_path().display()))
    }

    fn expose(&self) -> anyhow::Result<()> {
        let usr = Path::new(USR);
        if overlay_root::exposed(usr, USR_SOURCE)? {
            return Ok(());
        }
        self.tree.delta.open_usr(USR_SOURCE)?.expose(usr)
    }

    fn merge(&self) -> anyhow::Result<etc_merge::Report> {
        let plan = self.tree.load::<etc_merge::Plan>(&self.dir)?;
        let new = new_etc(etc_merge::open_dir(Path::new(USR))?.as_fd())?;
        let current = etc_merge::open_dir(Path::new(ETC))?;
        // Before the merge. A listed entry counts for a later merge only if /etc still has its content.
        self.remember_defaults(&plan.later())?;
        etc_merge::apply(&plan, new.as_fd(), current.as_fd(), &self.dir.etc_undo())
    }

    /// Stores the list of the defaults in `/etc` that came from node images, for the merge of the next boot.
    fn remember_defaults(&self, list: &etc_merge::Defaults) -> anyhow::Result<()> {
        let text = serde_json::to_vec(list).context("cannot write the list of defaults")?;
        let text = (!list.is_empty()).then_some(text);
        storage::of(&self.dir, &self.tree.delta)?
            .write_etc_defaults(text.as_deref())
            .context("cannot store the list of the defaults that the merge of /etc takes")
    }

    fn restore(&self) -> Undone {
        state::repair_undo_plan(&self.dir);
        let restored = etc_merge::open_dir(Path::new(ETC));
        let report = match restored.and_then(|dir| etc_merge::undo(&self.dir.etc_undo(), dir.as_fd())) {
            Ok(report) => report,
            Err(error) => return Undone { failed: vec![format!("/etc: {error:#}")], ..Undone::default() },
        };
        let line = |entry: &etc_merge::NotDone, verb| format!("/etc/{}{verb}: {}", entry.path, entry.reason);
        let mut undone = Undone {
            kept: report.kept.iter().map(|entry| line(entry, " stays")).collect(),
            failed: report.failed.iter().map(|entry| line(entry, "")).collect(),
        };
        if report.damaged > 0 {
            undone.kept.push(format!(
                "{} lines of the undo journal of /etc are damaged or missing: the content of these entries is restored, their \
                 labels and times are not; run restorecon on /etc",
                report.damaged
            ));
        }
        if report.unlabelled > 0 {
            undone.kept.push(format!(
                "{} entries of /etc could not be given their old security label; run restorecon on /etc",
                report.unlabelled
            ));
        }
        if undone.failed.is_empty() {
            match self.tree.load::<etc_merge::Plan>(&self.dir) {
                Ok(plan) => undone.extend(self.remember_defaults(&plan.earlier).into()),
                // A listed entry counts for the next merge only if /etc has its content, so the list is harmless.
                Err(error) => undone.kept.push(format!("the list of defaults in /etc was not restored: {error}")),
            }
        }
        undone
    }
}

fn withdraw() -> Undone {
    let usr = Path::new(USR);
    let lost =
        overlay_root::Namespace::init().mounts().map(|mounts| overlay_root::mounted_on(&mounts, usr, USR_SOURCE));
    let mut undone = Undone::default();
    match overlay_root::withdraw(usr, USR_SOURCE) {
        Ok(_) => undone.kept.extend(
            lost.into_iter()
                .flatten()
                .map(|place| format!("{} was unmounted together with the node image's /usr below it", place.display())),
        ),
        Err(error) => undone.failed.push(format!("/usr: {error:#}")),
    }
    undone
}
