//! Inspects units: a preview of the unit plan before the switch, and the units that run old code after it.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context as _, Result};

use super::StagedRoot;
use super::new_usr::{ChangedPaths, USR_SOURCE, new_etc};
use crate::config::Settings;
use crate::report::{StaleUnit, Tracker};
use etc_merge::Origin;
use unit_refresh::{Action, Class, Definitions, EtcChanges, Flow, Manager, Policy, Root, Sides, UnitFiles, Version};

/// The settings of the unit plan.
pub(super) struct UnitSettings {
    /// Requested actions.
    pub(super) policy: Policy,
    /// Target of the isolation.
    pub(super) target: String,
}

impl UnitSettings {
    /// Returns the settings. The target in the status document, which comes from the generator's drop-in, precedes the
    /// configured one.
    pub(super) fn of(settings: &Settings, tracker: &Tracker) -> Self {
        let target = tracker.status().target.unwrap_or_else(|| settings.target.clone());
        Self { policy: settings.units.clone(), target }
    }
}

/// Plans the actions for units before the switch, as a preview. The second list has a line for each fact that could not be
/// determined.
pub(super) async fn preview(
    UnitSettings { policy, target }: &UnitSettings,
    staged: &StagedRoot,
    plan: etc_merge::Plan,
    flow: Flow,
) -> Result<(Vec<Action>, Vec<String>)> {
    let changed = ChangedPaths::of(&staged.delta)?;
    let differs = |path: &Path| changed.contains(path);
    let delta = staged.delta.clone();
    let (old, new, systemd) = tokio::task::spawn_blocking(move || -> Result<_> {
        let tree = delta.open_usr(USR_SOURCE)?;
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
    let (before, after) = (old.pulled_in(target), new.pulled_in(target));
    let added = after.difference(&before).cloned().collect();
    let (version, differs) = (Version::Current, &differs);
    let sides = Sides { version, differs, old: &definitions, new: &new, added: &added, systemd };
    let (states, troubles) = unit_refresh::survey(&manager, &sides).await?;
    let mut actions = unit_refresh::plan(&states, flow, policy);
    if flow == Flow::Bootstrap {
        let active = unit_refresh::active(&manager).await?;
        actions.extend(unit_refresh::holds(&new, target, &active, policy));
        let starts = unit_refresh::starts(&added, &active, target);
        let planned: BTreeSet<_> = actions.iter().map(|action| action.unit.clone()).collect();
        actions.extend(starts.into_iter().filter(|start| !planned.contains(&start.unit)));
    }
    Ok((actions, troubles))
}

/// Returns the changes of the merge below `/etc/systemd`.
fn etc_changes(plan: &etc_merge::Plan, new_etc: &Path) -> EtcChanges {
    let concerned = plan.changes.iter().filter(|change| change.path.as_path().starts_with("systemd"));
    let applied = concerned.filter(|change| change.after.is_none() || change.content == Origin::New);
    applied
        .map(|change| {
            let path = change.path.as_path();
            (path.to_owned(), change.after.as_ref().map(|_| new_etc.join(path)))
        })
        .collect()
}

pub(super) async fn unit_files() -> Result<UnitFiles> {
    let read = tokio::task::spawn_blocking(|| Root::running().unit_files()).await.context("reading panicked")?;
    read.context("cannot read the unit files")
}

/// Returns the units that still run the bootimage's code: services first, by name.
pub(super) async fn still_old(manager: &Manager, changed: &ChangedPaths) -> Result<Vec<StaleUnit>> {
    let (old, new, added) = (Definitions::new(), UnitFiles::default(), BTreeSet::new());
    let differs = |path: &Path| changed.contains(path);
    let (version, differs) = (Version::Replaced, &differs);
    let sides = Sides { version, differs, old: &old, new: &new, added: &added, systemd: None };
    let (states, _) = unit_refresh::survey(manager, &sides).await?;
    let mut units: Vec<_> =
        states.into_iter().map(|state| StaleUnit { unit: state.name, files: state.changed }).collect();
    units.sort_by(order);
    Ok(units)
}

/// Orders units for an administrator. systemd lists them in an arbitrary order.
fn order(one: &StaleUnit, other: &StaleUnit) -> Ordering {
    let key = |unit: &str| (!unit.ends_with(".service"), unit.starts_with("user@"));
    key(&one.unit).cmp(&key(&other.unit)).then_with(|| one.unit.cmp(&other.unit))
}

/// Returns lines for the summary: the actions, and the units that still run old code.
pub(super) fn notes(actions: &[Action], old: &[StaleUnit]) -> Vec<String> {
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

/// Returns the configured policy for units, or the default if the configuration is invalid, because an undo must continue.
pub(super) fn policy() -> Policy {
    Settings::load().map(|settings| settings.units).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_units_by_action() {
        let one = |unit: &str, class| Action::new(unit, class, "r");
        let actions = [
            one("a.service", Class::Restart),
            one("b.service", Class::Never),
            one("c.service", Class::Restart),
            one("d.timer", Class::Stop),
        ];
        let old = [StaleUnit { unit: "b.service".into(), files: Vec::new() }];
        assert_eq!(
            notes(&actions, &old),
            ["stopped: d.timer", "restarted: a.service c.service", "still runs the bootimage's code: b.service"]
        );
        assert_eq!(notes(&[], &[]), [""; 0]);
    }

    #[test]
    fn services_are_listed_before_sessions_by_name() {
        let unit = |unit: &str| StaleUnit { unit: unit.into(), files: Vec::new() };
        let expected = ["chronyd.service", "sshd.service", "user@0.service", "init.scope", "session-1.scope"];
        for first in 0..expected.len() {
            let mut units: Vec<_> = (0..expected.len()).map(|at| unit(expected[(first + 3 * at) % 5])).collect();
            units.sort_by(order);
            assert_eq!(units.iter().map(|unit| unit.unit.as_str()).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn only_new_content_below_systemd_counts() {
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
