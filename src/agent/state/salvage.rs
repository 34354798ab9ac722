//! Opens the record, and rebuilds the input of an undo if the record of a switch is lost or damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::{Record, StateDir, StateFile, Step, SwitchPlan, UndoTree, Unusable, if_present};
use crate::agent::auto_undo::{self, TrialPeriod};
use crate::agent::new_usr::{USR, USR_SOURCE};
use crate::agent::storage;
use node_store::image::ResolvedImage;
use node_store::import::PulledImage;
use overlay_root::delta::Delta;
use support::directory::Directory;

/// Name that a damaged record gets when nothing is switched.
const ASIDE: &str = "state.json.damaged";

/// Plan in the undo record of `/etc`.
const UNDO_PLAN: &str = "plan.json";

/// Traces of a switch on the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Traces {
    /// The node image's `/usr` is mounted.
    usr: bool,
    /// There is an undo journal of `/etc`.
    etc: bool,
}

impl Traces {
    fn on_this_machine(paths: &StateDir) -> Self {
        Self {
            // An unreadable mount table proves nothing; the switch reads it again.
            usr: overlay_root::exposed(Path::new(USR), USR_SOURCE).unwrap_or(false),
            etc: paths.etc_undo().join(UNDO_PLAN).exists(),
        }
    }

    fn any(self) -> bool {
        self.usr || self.etc
    }
}

/// The decision about the record.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// With the record.
    Use,
    /// From the beginning: nothing is switched.
    Begin,
    /// With an undo only; the message says why.
    Lost(String),
}

/// Decides by the record and by the traces of a switch on the machine.
fn judge(loaded: Result<&Record, &Unusable>, traces: Traces, file: &Path) -> Verdict {
    let cause = match loaded {
        Ok(record) if !(traces.usr && record.step.is_before_switch()) => return Verdict::Use,
        _ if !traces.any() => return Verdict::Begin,
        Ok(record) => format!("it says {:?}", record.step.name()),
        Err(unusable) => unusable.damage.to_string(),
    };
    let left = match (traces.usr, traces.etc) {
        (true, true) => "/usr is the node image's, and changes in /etc are merged",
        (true, false) => "/usr is the node image's",
        _ => "changes of a node image are merged in /etc",
    };
    Verdict::Lost(format!(
        "cannot use the record of the switch, {}: {cause}; {left}; run undo to restore the bootimage's, or reboot",
        file.display()
    ))
}

/// Returns the record under `paths`, a new one, or one that only allows an undo. Changes nothing.
pub(in crate::agent) fn open(paths: &StateDir) -> Record {
    let loaded = Record::load(paths);
    let verdict = judge(loaded.as_ref(), Traces::on_this_machine(paths), &paths.run().join(Record::NAME));
    match (verdict, loaded) {
        (Verdict::Use, Ok(record)) => record,
        (Verdict::Lost(message), _) => {
            let trial = auto_undo::armed().map(|until_boottime_ms| TrialPeriod { until_boottime_ms, kept: false });
            Record::at(Step::Lost { tree: undo_tree(paths), message }).with(trial)
        }
        _ => Record::default(),
    }
}

/// Returns a line about a record that cannot be used and is not needed, because nothing is switched.
pub(in crate::agent) fn unused(paths: &StateDir) -> Option<String> {
    if_present(Record::load(paths)).err().map(|unusable| unusable.to_string())
}

/// Renames an unusable record, for an administrator who looks for the cause, and returns the line of [`unused`].
pub(in crate::agent) fn set_aside(paths: &StateDir) -> Option<String> {
    let line = unused(paths)?;
    warn!("{line}");
    let aside = paths.run().join(ASIDE);
    if let Err(error) = std::fs::rename(paths.run().join(Record::NAME), &aside) {
        warn!("cannot keep the record as {}: {error}", aside.display());
    }
    Some(line)
}

/// Replaces a damaged plan in the undo record of `/etc` by the copy from stage, so that the merge can be undone.
pub(in crate::agent) fn repair_undo_plan(paths: &StateDir) {
    let Ok(own) = std::fs::read(paths.etc_undo().join(UNDO_PLAN)) else { return };
    let Err(damage) = serde_json::from_slice::<etc_merge::Plan>(&own) else { return };
    let repaired = paths.load::<etc_merge::Plan>().map_err(anyhow::Error::from).and_then(|plan| {
        let text = serde_json::to_vec(&plan)?;
        Ok(Directory::ensure(&paths.etc_undo())?.write_atomic(UNDO_PLAN, 0o600, &text)?)
    });
    match repaired {
        Ok(()) => warn!("the plan in the undo record of /etc was damaged ({damage}): using the copy from stage"),
        Err(error) => warn!("the plan in the undo record of /etc is damaged, and so is its copy: {error:#}"),
    }
}

/// Returns the facts about the switch in the other files. Unknown ones stay empty; an undo does not need them.
fn undo_tree(paths: &StateDir) -> UndoTree {
    let plan = paths.load::<SwitchPlan>().ok();
    let (counts, base) = plan.as_ref().map(|plan| (plan.usr, plan.base.clone())).unwrap_or_default();
    let delta = Delta { directory: delta(paths), counts, base, ..Delta::default() };
    UndoTree { pulled: plan.and_then(pulled), delta, plans: BTreeMap::new() }
}

fn pulled(plan: SwitchPlan) -> Option<PulledImage> {
    let digest = plan.image.digest()?;
    Some(PulledImage {
        image: ResolvedImage { requested: plan.image.clone(), pinned: plan.image, digest },
        commit: plan.commit,
        booted_commit: plan.booted_commit,
        complete: false,
        layers_fetched: 0,
        layers_skipped: 0,
        bytes_fetched: 0,
        objects_written: 0,
        warnings: Vec::new(),
    })
}

fn delta(paths: &StateDir) -> PathBuf {
    storage::delta_path(paths).unwrap_or_else(|error| {
        warn!("cannot find the node store: {error:#}");
        paths.store().join("delta")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_switched_system_never_counts_as_unchanged() {
        let idle = Record::default();
        let undoing = Record::at(Step::Lost { tree: undo_tree(&StateDir::default()), message: String::new() });
        let [missing, malformed] = [None, Some("{")].map(|text| {
            let temp = tempfile::tempdir().unwrap();
            text.into_iter().for_each(|text| std::fs::write(temp.path().join(Record::NAME), text).unwrap());
            Record::load(&StateDir::below(temp.path())).unwrap_err()
        });
        let traces = |usr, etc| Traces { usr, etc };
        let lost = [traces(true, true), traces(true, false), traces(false, true)];
        let judge = |loaded, traces| judge(loaded, traces, Path::new("/x/state.json"));
        for loaded in [Err(&missing), Err(&malformed)] {
            assert_eq!(judge(loaded, traces(false, false)), Verdict::Begin);
            for traces in lost {
                let Verdict::Lost(message) = judge(loaded, traces) else { panic!("{loaded:?} {traces:?}") };
                assert!(message.contains("/x/state.json") && message.contains("run undo"), "{message}");
                assert_eq!(message.contains("/usr is the node image's"), traces.usr, "{message}");
                assert_eq!(message.contains("/etc"), traces.etc, "{message}");
            }
        }
        for traces in [traces(false, false), traces(false, true)] {
            assert_eq!(judge(Ok(&idle), traces), Verdict::Use);
        }
        assert!(matches!(judge(Ok(&idle), traces(true, false)), Verdict::Lost(_)), "a record older than the switch");
        for traces in lost {
            assert_eq!(judge(Ok(&undoing), traces), Verdict::Use);
        }
    }

    #[test]
    fn a_damaged_undo_plan_is_replaced_by_its_copy() {
        let temp = tempfile::tempdir().unwrap();
        let paths = StateDir::below(temp.path());
        let plan = serde_json::to_string(&etc_merge::Plan::default()).unwrap();
        let own = paths.etc_undo().join(UNDO_PLAN);
        repair_undo_plan(&paths);
        assert!(!own.exists(), "without a merge there is nothing to undo");
        std::fs::create_dir_all(paths.etc_undo()).unwrap();
        std::fs::write(&own, &plan[..20]).unwrap();
        repair_undo_plan(&paths);
        assert_eq!(std::fs::read_to_string(&own).unwrap(), plan[..20], "the copy is missing");
        paths.save(&etc_merge::Plan::default(), None).unwrap();
        repair_undo_plan(&paths);
        assert_eq!(std::fs::read_to_string(&own).unwrap(), plan);
    }

    #[test]
    fn a_damaged_record_is_renamed() {
        let temp = tempfile::tempdir().unwrap();
        let paths = StateDir::below(temp.path());
        std::fs::write(temp.path().join(Record::NAME), "{").unwrap();
        assert!(set_aside(&paths).unwrap().contains("damaged"));
        assert_eq!(std::fs::read_to_string(temp.path().join(ASIDE)).unwrap(), "{");
        assert_eq!(if_present(Record::load(&paths)).unwrap().map(|record| record.step.name()), None);
        Record::default().save(&paths).unwrap();
        assert_eq!(set_aside(&paths), None);
        assert!(Record::load(&paths).is_ok(), "a usable record stays");
    }
}
