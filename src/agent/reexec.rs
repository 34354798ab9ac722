//! Re-execution of PID 1 and of the managers of users.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use tracing::{info, warn};

use super::new_usr::ChangedPaths;
use crate::report::Tracker;
use overlay_root::Namespace;
use unit_refresh::{Guard, Manager};

/// Marker of the first boot, which `ConditionFirstBoot=` looks for. systemd removes it when it re-executes itself.
const FIRST_BOOT: &str = "/run/systemd/first-boot";
/// Largest number of units that a message names.
const NAMED: usize = 10;

/// Starts a process that re-executes PID 1 if the agent dies, unless there is one. A failure to start it is logged and not fatal, because it is
/// needed only if the agent is killed.
pub(super) async fn guard(guard: &mut Option<Guard>) {
    if guard.is_none() {
        let started = tokio::task::spawn_blocking(Guard::start).await.map_err(anyhow::Error::from);
        *guard = started.and_then(|started| started).inspect_err(|error| warn!("{error:#}")).ok();
    }
}

/// Re-executes PID 1 if its files changed, else reloads it. It has read the new unit files in both cases.
pub(super) async fn renew_manager(tracker: &Tracker, changed: &ChangedPaths) -> Result<()> {
    let manager = Manager::connect().await?;
    if !unit_refresh::mapped_files(1).iter().any(|path| changed.contains(Path::new(path))) {
        return manager.reload().await;
    }
    let mut troubles = Vec::new();
    reexecute(manager, &mut troubles).await?;
    tracker.note("systemd was re-executed: its binary or libraries changed");
    tracker.warn_all(troubles);
    Ok(())
}

/// Re-executes PID 1 and the managers of users from the `/usr` in place. All keep their running units. Since version 255 a
/// manager starts services through a program of its release's `/usr`, so a manager that is not re-executed cannot start
/// services.
pub(super) async fn reexecute(manager: Manager, troubles: &mut Vec<String>) -> Result<Manager> {
    let release = manager.version().await.ok().and_then(|version| unit_refresh::release(&version));
    let before = states(&manager).await?;
    let is_first_boot = Path::new(FIRST_BOOT).exists();
    let renewed = manager.reexecute().await;
    // Also after an error: systemd may have re-executed itself before it.
    if is_first_boot && let Err(error) = std::fs::write(FIRST_BOOT, "") {
        troubles.push(format!("cannot write {FIRST_BOOT}: {error}; units with ConditionFirstBoot=yes do not start"));
    }
    let manager = renewed?;
    if let Err(error) = check(&manager, &before, troubles).await {
        troubles.push(format!("cannot check that systemd still knows its units: {error:#}"));
    }
    // Older managers of users do not know the signal, and end.
    if release.is_some_and(|release| release >= 250)
        && let Err(error) = reexecute_users(&manager, troubles).await
    {
        troubles.push(format!("cannot list the managers of users to re-execute them: {error:#}"));
    }
    Ok(manager)
}

async fn reexecute_users(manager: &Manager, troubles: &mut Vec<String>) -> Result<()> {
    for unit in unit_refresh::active(manager).await?.iter().filter(|unit| unit.starts_with("user@")) {
        match manager.reexecute_user(unit).await {
            Ok(()) => info!("{unit}: asked to re-execute itself"),
            Err(error) => troubles.push(format!(
                "cannot re-execute {unit}: {error:#}; it may be unable to start services until its user has logged out"
            )),
        }
    }
    Ok(())
}

/// The state of each loaded unit.
type States = BTreeMap<String, String>;

async fn states(manager: &Manager) -> Result<States> {
    Ok(manager.list().await?.into_iter().map(|unit| (unit.name, unit.active)).collect())
}

/// Checks that PID 1 still knows the units that were active. systemd can lose its state when it re-executes itself
/// (systemd#28184): running units then count as inactive. A reload reads the unit files again; units that are still
/// missing are reported.
async fn check(manager: &Manager, before: &States, troubles: &mut Vec<String>) -> Result<()> {
    let mounts: BTreeSet<_> =
        Namespace::init().mounts()?.iter().map(|mount| unit_refresh::mount_unit(&mount.target)).collect();
    if forgotten(before, &states(manager).await?, &mounts).is_empty() {
        return Ok(());
    }
    manager.reload().await?;
    let forgotten = forgotten(before, &states(manager).await?, &mounts);
    if !forgotten.is_empty() {
        let named: Vec<_> = forgotten.iter().copied().take(NAMED).collect();
        let more = if forgotten.len() > NAMED { " …" } else { "" };
        troubles.push(format!(
            "systemd re-executed itself, and {} units that were active before are not any more: {}{more}; see systemctl \
             status, and start those that should run",
            forgotten.len(),
            named.join(" ")
        ));
    }
    Ok(())
}

/// Returns the units that were active and are unknown or inactive now. Ignores scopes and devices, which appear and
/// disappear by themselves, and units that were not active, such as running oneshots. Also ignores the units in `mounts`,
/// whose mounts are in place: releases of systemd differ in the mounts that have no unit, such as those of credentials.
fn forgotten<'a>(before: &'a States, after: &States, mounts: &BTreeSet<String>) -> BTreeSet<&'a str> {
    const KINDS: &[&str] = &[".service", ".socket", ".timer", ".path", ".mount", ".target", ".slice"];
    let concerned = |name: &str| KINDS.iter().any(|kind| name.ends_with(kind));
    let was =
        before.iter().filter(|(name, state)| *state == "active" && concerned(name)).map(|(name, _)| name.as_str());
    let lost = was.filter(|name| after.get(*name).is_none_or(|state| state == "inactive"));
    lost.filter(|name| !mounts.contains(*name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lasting_units_count_as_forgotten() {
        let states = |rows: &[(&str, &str)]| -> States {
            rows.iter().map(|&(name, state)| (name.to_owned(), state.to_owned())).collect()
        };
        let before = states(&[
            ("a.service", "active"),
            ("b.service", "active"),
            ("c.service", "inactive"),
            ("d.socket", "active"),
            ("e.scope", "active"),
            ("f.device", "active"),
            ("g.service", "active"),
            ("h.service", "active"),
            ("run-i.mount", "active"),
            ("run-j.mount", "active"),
        ]);
        let after = states(&[
            ("a.service", "active"),
            ("b.service", "inactive"),
            ("g.service", "failed"),
            ("h.service", "deactivating"),
            ("new.service", "active"),
            ("run-i.mount", "inactive"),
        ]);
        let mounts = BTreeSet::from(["run-i.mount".to_owned()]);
        assert_eq!(Vec::from_iter(forgotten(&before, &after, &mounts)), ["b.service", "d.socket", "run-j.mount"]);
        assert!(forgotten(&before, &before, &mounts).is_empty());
    }
}
