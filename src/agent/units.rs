//! The units' part of stage, refresh, finish and undo: what is planned for them, and carrying it out so that a daemon
//! that is killed in between does nothing twice.
//!
//! `units.json` in the agent's directory holds what the units were before the switch, and each act with how far it is.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::new_usr::{ChangedPaths, USR, USR_SOURCE, new_etc};
use super::{Context, Error, Paths, StagedRoot};
use crate::report::StillOld;
use etc_merge::Origin;
use support::directory::Directory;
use unit_refresh::{
    Action, Class, Definitions, EtcChanges, Flow, Manager, Policy, Root, Sides, UnitFiles, Verb, Version,
};

/// A file of the agent's directory.
const FILE: &str = "units.json";

/// One action, and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Act {
    action: Action,
    /// How many of its jobs are done, well or not.
    #[serde(default)]
    done: usize,
    /// Whether one of them went wrong.
    #[serde(default)]
    failed: bool,
    /// The run of the unit that a restart ends, in hexadecimal: another one says that it was done, by a daemon before us or
    /// along with another unit.
    #[serde(default)]
    ending: Option<String>,
}

impl From<Action> for Act {
    fn from(action: Action) -> Self {
        Self { action, done: 0, failed: false, ending: None }
    }
}

/// What is remembered of the units, from before the switch until the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UnitsRecord {
    /// What was active, as it was defined. What is restarted or stopped is taken out.
    before: Definitions,
    /// The sockets that the final target pulled in; absent where an older agent switched.
    #[serde(default)]
    sockets: Option<BTreeSet<String>>,
    /// The flow that was planned for; absent until there is a plan.
    #[serde(default)]
    pub(super) flow: Option<Flow>,
    #[serde(default)]
    acts: Vec<Act>,
}

impl UnitsRecord {
    /// `None` where no switch has begun.
    pub(super) fn load(paths: &Paths) -> Result<Option<Self>> {
        let shown = paths.run().join(FILE);
        let text = Directory::ensure(paths.run()).and_then(|dir| dir.read_optional(FILE));
        let text = text.with_context(|| format!("cannot read {}", shown.display()))?;
        let damaged =
            || format!("{} is damaged; remove it, then units are known by the code they run alone", shown.display());
        text.map(|text| serde_json::from_slice(&text).with_context(damaged)).transpose()
    }

    fn save(&self, paths: &Paths) -> Result<()> {
        let text = serde_json::to_vec(self).context("cannot write down what happens to units")?;
        Directory::ensure(paths.run())
            .and_then(|dir| dir.write_atomic(FILE, 0o600, &text))
            .with_context(|| format!("cannot write {}", paths.run().join(FILE).display()))
    }

    /// Units that the switch stopped: an undo starts them again.
    pub(super) fn stopped(&self) -> impl Iterator<Item = &str> {
        let done = self.acts.iter().filter(|act| act.action.class == Class::Stop && act.done > 0);
        done.map(|act| act.action.unit.as_str())
    }
}

/// What would happen to units, before the switch; with what could not be found out.
pub(super) async fn preview(
    context: &Context,
    staged: &StagedRoot,
    plan: etc_merge::Plan,
    flow: Flow,
) -> Result<(Vec<Action>, Vec<String>)> {
    let changed = ChangedPaths::of(staged)?;
    let differs = |path: &Path| changed.contains(path);
    let directory = staged.delta.directory.clone();
    let (old, new, systemd) = tokio::task::spawn_blocking(move || -> Result<_> {
        let tree = overlay_root::open_new_usr(&directory, Path::new(USR), USR_SOURCE)?;
        let new_etc = new_etc(tree.as_fd())?;
        let at = |fd: BorrowedFd<'_>| Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
        let new = Root { usr: at(tree.as_fd()), etc: etc_changes(&plan, &at(new_etc.as_fd())) };
        Ok((Root::running().unit_files()?, new.unit_files()?, new.systemd_release()))
    })
    .await
    .context("reading unit files panicked")?
    .context("cannot read the unit files")?;
    let manager = Manager::connect().await?;
    let definitions = unit_refresh::definitions(&manager, &old).await?;
    let target = target(context);
    let (before, after) = (old.pulled_in(&target), new.pulled_in(&target));
    let added = after.difference(&before).cloned().collect();
    let (version, differs) = (Version::Current, &differs);
    let sides = Sides { version, differs, old: &definitions, new: &new, added: &added, systemd };
    let (states, troubles) = unit_refresh::survey(&manager, &sides).await?;
    let mut actions = unit_refresh::plan(&states, flow, &context.settings.units);
    if flow == Flow::Bootstrap {
        let active = unit_refresh::active(&manager).await?;
        let starts = unit_refresh::starts(&added, &active, &target);
        let planned: BTreeSet<_> = actions.iter().map(|action| action.unit.clone()).collect();
        actions.extend(starts.into_iter().filter(|start| !planned.contains(&start.unit)));
    }
    Ok((actions, troubles))
}

/// The target of the isolate: what the daemon that saw the generator's drop-in was told.
pub(super) fn target(context: &Context) -> String {
    context.tracker.status().target.unwrap_or_else(|| context.settings.target.clone())
}

/// The merge as far as unit files see it.
fn etc_changes(plan: &etc_merge::Plan, new_etc: &Path) -> EtcChanges {
    let concerned = plan.changes.iter().filter(|change| change.path.as_path().starts_with("systemd"));
    let arrives = concerned.filter(|change| change.after.is_none() || change.content == Origin::New);
    arrives
        .map(|change| {
            let path = change.path.as_path();
            (path.to_owned(), change.after.as_ref().map(|_| new_etc.join(path)))
        })
        .collect()
}

/// Writes down what the units are, before the first act of the switch. Nothing is changed.
pub(super) async fn remember(context: &Context) -> Result<(), Error> {
    let remembered = async {
        let files = unit_files().await?;
        let before = unit_refresh::definitions(&Manager::connect().await?, &files).await?;
        let mut sockets = files.pulled_in(&target(context));
        sockets.retain(|name| name.ends_with(".socket"));
        UnitsRecord { before, sockets: Some(sockets), ..UnitsRecord::default() }.save(&context.paths)
    };
    remembered.await.map_err(Error::from)
}

async fn unit_files() -> Result<UnitFiles> {
    let read = tokio::task::spawn_blocking(|| Root::running().unit_files()).await.context("reading panicked")?;
    read.context("cannot read the unit files")
}

/// Plans for `flow`, once, and carries the plan out, from where a daemon before us was killed. Returns the actions that
/// were carried out; what went wrong is added to `trouble`.
pub(super) async fn carry_out(
    context: &Context,
    manager: &mut Manager,
    changed: &ChangedPaths,
    flow: Flow,
    trouble: &mut Vec<String>,
) -> Result<Vec<Action>> {
    let paths = &context.paths;
    // Without one an older agent switched: then units are known by what they run only.
    let mut record = UnitsRecord::load(paths)?.unwrap_or_default();
    if record.flow != Some(flow) {
        let new = unit_files().await?;
        let added = |before| new.pulled_in(&target(context)).difference(before).cloned().collect();
        let added = record.sockets.as_ref().map(added).unwrap_or_default();
        let systemd = Root::running().systemd_release();
        let differs = |path: &Path| changed.contains(path);
        let (version, old, differs) = (Version::Replaced, &record.before, &differs);
        let sides = Sides { version, differs, old, new: &new, added: &added, systemd };
        let (states, troubles) = match unit_refresh::survey(manager, &sides).await {
            // Somebody re-executed systemd.
            Err(error) if Manager::is_lost(&error) => {
                *manager = Manager::connect().await?;
                unit_refresh::survey(manager, &sides).await?
            }
            surveyed => surveyed?,
        };
        trouble.extend(troubles);
        // What was done for the flow before is still what happened.
        record.acts.retain(|act| act.done > 0);
        for action in unit_refresh::plan(&states, flow, &context.settings.units) {
            let mut act = Act::from(action);
            if act.action.jobs().iter().any(|(verb, _)| *verb == Verb::TryRestart) {
                act.ending = manager.invocation(&act.action.unit).await.ok().map(hex::encode);
            }
            record.acts.push(act);
        }
        record.flow = Some(flow);
        record.save(paths)?;
    }
    for index in 0..record.acts.len() {
        let action = record.acts[index].action.clone();
        let jobs = action.jobs();
        if record.acts[index].done < jobs.len() || jobs.is_empty() {
            info!("{}: {}: {}", action.unit, action.class.as_str(), action.reason);
        }
        while let Some(&(verb, unit)) = jobs.get(record.acts[index].done) {
            if let Err(error) = carry_out_one(paths, manager, &mut record, index, verb, unit).await? {
                trouble.push(format!("{error:#}"));
            }
        }
    }
    if let Err(error) = look_along(manager, &record.acts, trouble).await {
        trouble.push(format!("cannot tell what became of units that were restarted along: {error:#}"));
    }
    Ok(record.acts.into_iter().filter(|act| !act.failed).map(|act| act.action).collect())
}

/// The outer error is about the record, the inner one about the unit.
async fn carry_out_one(
    paths: &Paths,
    manager: &mut Manager,
    record: &mut UnitsRecord,
    index: usize,
    verb: Verb,
    unit: &str,
) -> Result<Result<()>> {
    let mut outcome = Ok(());
    let act = &record.acts[index];
    let run = match verb {
        Verb::TryRestart if act.ending.is_some() => manager.invocation(unit).await.ok().map(hex::encode),
        _ => None,
    };
    if run.is_none() || run == act.ending {
        outcome = manager.run(verb, unit, Manager::JOB_TIMEOUT).await;
        if act.action.class == Class::Stop && outcome.is_ok() {
            // How it ended concerns nobody: it has no unit file any more.
            outcome = manager.reset_failed(unit).await;
        }
    }
    record.acts[index].done += 1;
    record.acts[index].failed |= outcome.is_err();
    record.before.remove(unit);
    record.save(paths)?;
    Ok(outcome)
}

/// Of units that systemd restarts along with others nobody waits for the jobs: what fails among them is told here.
async fn look_along(manager: &Manager, acts: &[Act], trouble: &mut Vec<String>) -> Result<()> {
    // Targets are up when all is that they want, which may be long after us.
    let along = acts.iter().flat_map(|act| &act.action.dependents).map(String::as_str);
    let along: BTreeSet<_> = along.filter(|name| !name.ends_with(".target")).collect();
    if along.is_empty() {
        return Ok(());
    }
    let deadline = Instant::now() + Manager::JOB_TIMEOUT;
    let (pending, failed) = loop {
        let (pending, failed) = manager.pending_and_failed(&along).await?;
        if pending.is_empty() || Instant::now() >= deadline {
            break (pending, failed);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let of = |unit: &String| {
        acts.iter().find(|act| act.action.dependents.contains(unit)).map(|act| act.action.unit.as_str())
    };
    for (units, how) in [(&pending, "is still not up"), (&failed, "has failed")] {
        trouble.extend(units.iter().map(|unit| {
            let because = of(unit).unwrap_or_default();
            format!("{unit} {how}: it was restarted along with {because}; see systemctl status {unit}")
        }));
    }
    Ok(())
}

/// What still runs the bootimage's code.
pub(super) async fn still_old(manager: &Manager, changed: &ChangedPaths) -> Result<Vec<StillOld>> {
    let (old, new, added) = (Definitions::new(), UnitFiles::default(), BTreeSet::new());
    let differs = |path: &Path| changed.contains(path);
    let (version, differs) = (Version::Replaced, &differs);
    let sides = Sides { version, differs, old: &old, new: &new, added: &added, systemd: None };
    let (states, _) = unit_refresh::survey(manager, &sides).await?;
    Ok(states.into_iter().map(|state| StillOld { unit: state.name, files: state.changed }).collect())
}

/// What was done and what was left, for the summary.
pub(super) fn notes(actions: &[Action], old: &[StillOld]) -> Vec<String> {
    let mut notes = Vec::new();
    for (class, done) in [(Class::Stop, "stopped"), (Class::Reload, "reloaded"), (Class::Restart, "restarted")] {
        let units: Vec<_> = actions.iter().filter(|one| one.class == class).map(|one| one.unit.as_str()).collect();
        if !units.is_empty() {
            notes.push(format!("{done}: {}", units.join(" ")));
        }
    }
    if !old.is_empty() {
        let units: Vec<_> = old.iter().map(|one| one.unit.as_str()).collect();
        notes.push(format!("still runs the bootimage's code: {}", units.join(" ")));
    }
    notes
}

/// The policy of the configuration, for an undo, which has to go on without one that can be read.
pub(super) fn policy() -> Policy {
    crate::config::Settings::load().map(|settings| settings.units).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use unit_refresh::{Definition, How};

    #[test]
    fn kept_and_read_again() {
        let temp = tempfile::tempdir().unwrap();
        let paths = Paths::below(temp.path());
        assert_eq!(UnitsRecord::load(&paths).unwrap(), None);
        let act = |unit: &str, class, done| Act {
            action: Action { how: How::LeftToSocket("s.socket".into()), ..Action::new(unit, class, "r") },
            done,
            failed: false,
            ending: Some("00ff".into()),
        };
        let record = UnitsRecord {
            before: [("a.service".to_owned(), Definition::default())].into(),
            sockets: Some(["s.socket".to_owned()].into()),
            flow: Some(Flow::Live),
            acts: vec![
                act("a.service", Class::Stop, 1),
                act("b.service", Class::Stop, 0),
                act("c.service", Class::Restart, 1),
            ],
        };
        record.save(&paths).unwrap();
        assert_eq!(UnitsRecord::load(&paths).unwrap(), Some(record.clone()));
        assert_eq!(record.stopped().collect::<Vec<_>>(), ["a.service"], "what was not stopped is not started");
        std::fs::write(temp.path().join(FILE), "{").unwrap();
        assert!(UnitsRecord::load(&paths).unwrap_err().to_string().contains("units.json is damaged"));
    }

    #[test]
    fn what_the_summary_says() {
        let one = |unit: &str, class| Action::new(unit, class, "r");
        let actions = [
            one("a.service", Class::Restart),
            one("b.service", Class::Never),
            one("c.service", Class::Restart),
            one("d.timer", Class::Stop),
        ];
        let old = [StillOld { unit: "b.service".into(), files: Vec::new() }];
        assert_eq!(
            notes(&actions, &old),
            ["stopped: d.timer", "restarted: a.service c.service", "still runs the bootimage's code: b.service"]
        );
        assert_eq!(notes(&[], &[]), [""; 0]);
    }

    #[test]
    fn the_merge_as_unit_files_see_it() {
        use etc_merge::{Change, Content, Leaf, Meta};
        let leaf = || Leaf { meta: Meta::default(), content: Content::Other };
        let change = |path: &str, after: Option<Leaf>, content| Change {
            path: path.into(),
            before: None,
            after,
            content,
            label: None,
        };
        let plan = etc_merge::Plan {
            changes: vec![
                change("systemd/system/a.service", Some(leaf()), Origin::New),
                change("systemd/system/b.service", None, Origin::New),
                change("systemd/system/chmod.service", Some(leaf()), Origin::Current),
                change("passwd", Some(leaf()), Origin::New),
            ],
            ..etc_merge::Plan::default()
        };
        let expected = [
            ("systemd/system/a.service".into(), Some("/new/systemd/system/a.service".into())),
            ("systemd/system/b.service".into(), None),
        ];
        assert_eq!(etc_changes(&plan, Path::new("/new")), expected.into());
    }
}
