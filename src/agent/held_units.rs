//! Holds back units that the isolate would start and that may end the boot. Each gets a drop-in with a condition on a file
//! of the agent, below `/run`, so that the next boot starts them.

use std::path::Path;

use anyhow::{Context as _, Result};
use tracing::info;

use super::StateDir;
use super::unit_survey::{UnitSettings, unit_files};
use crate::report::Tracker;
use support::directory::Directory;
use unit_refresh::{Action, Manager};

/// Directory of the drop-ins; systemd.unit(5).
const UNITS: &str = "/run/systemd/system";
const DROP_IN: &str = "99-node-image-pivot.conf";

/// Holds back the units that isolating the target would start and that may end the boot, and lists them in the report.
///
/// # Errors
/// The unit files cannot be read, a drop-in cannot be written, or systemd does not answer.
pub(super) async fn hold_back(
    tracker: &Tracker,
    dir: &StateDir,
    UnitSettings { policy, target }: &UnitSettings,
) -> Result<()> {
    let manager = Manager::connect().await?;
    let (files, active) = (unit_files().await?, unit_refresh::active(&manager).await?);
    let held = unit_refresh::holds(&files, target, &active, policy);
    // Also if there are none: an earlier call may have held units that the configuration names now.
    let released = hold(Path::new(UNITS), dir, &held).context("cannot hold back units that may end the boot")?;
    if held.is_empty() && !released {
        return Ok(());
    }
    manager.reload().await?;
    if held.is_empty() {
        return Ok(());
    }
    for Action { unit, class, reason, .. } in &held {
        info!("{unit}: {}: {reason}", class.as_str());
    }
    let names: Vec<_> = held.iter().map(|action| action.unit.as_str()).collect();
    tracker.note(format!("held back until the next boot: {}", names.join(" ")));
    Ok(())
}

/// Permits systemd to start the units, from its next reload on.
pub(super) fn release(dir: &StateDir) -> Result<()> {
    hold(Path::new(UNITS), dir, &[])?;
    dir.remove(StateDir::HELD)
}

/// Writes a mark and a drop-in for each unit, and then removes those of other units. Returns true if there were any.
fn hold(units: &Path, dir: &StateDir, held: &[Action]) -> Result<bool> {
    let marks = dir.run().join(StateDir::HELD);
    let put = |folder: &Path, name: &str, text: &str| {
        let written = Directory::ensure(folder).and_then(|folder| folder.write_atomic(name, 0o644, text.as_bytes()));
        written.with_context(|| format!("cannot write {}", folder.join(name).display()))
    };
    for Action { unit, reason, .. } in held {
        let mark = marks.join(unit).display().to_string();
        let text = format!("# Remove {mark} to start this unit before the next boot.\n");
        let text = format!("{text}[Unit]\nConditionPathExists=!{mark}\n");
        put(&units.join(format!("{unit}.d")), DROP_IN, &text)?;
        put(&marks, unit, &format!("{reason}\n"))?;
    }
    let mut released = false;
    for folder in support::if_found(std::fs::read_dir(units))?.into_iter().flatten() {
        let folder = folder?.path();
        let unit = folder.file_name().and_then(|name| name.to_str()?.strip_suffix(".d"));
        let Some(unit) = unit.filter(|unit| held.iter().all(|action| action.unit != *unit)) else { continue };
        if support::if_found(std::fs::remove_file(folder.join(DROP_IN)))?.is_some() {
            // Fails if the directory has drop-ins of others.
            let _ = std::fs::remove_dir(&folder);
            support::ignore_missing(std::fs::remove_file(marks.join(unit)))?;
            released = true;
        }
    }
    Ok(released)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use unit_refresh::Class;

    #[test]
    fn held_units_have_a_condition_until_they_are_released() {
        let temp = tempfile::tempdir().unwrap();
        let (units, dir) = (temp.path().join("system"), StateDir::below(&temp.path().join("run")));
        let held = ["zincati.service", "a.timer"].map(|unit| Action::new(unit, Class::Hold, "r"));
        let marks = dir.run().join("held-units");
        let is_held = |unit: &str| {
            let mark = marks.join(unit);
            let text = std::fs::read_to_string(units.join(format!("{unit}.d/{DROP_IN}"))).ok()?;
            assert!(text.ends_with(&format!("[Unit]\nConditionPathExists=!{}\n", mark.display())), "{text}");
            assert_eq!(std::fs::read_to_string(mark).unwrap(), "r\n");
            Some(())
        };
        assert!(!hold(&units, &dir, &held).unwrap());
        assert!(held.iter().all(|action| is_held(&action.unit).is_some()));
        std::fs::write(units.join("zincati.service.d/local.conf"), "").unwrap();
        assert!(hold(&units, &dir, &held[1..]).unwrap(), "the configuration names the other one now");
        assert_eq!((is_held("zincati.service"), is_held("a.timer")), (None, Some(())));
        assert!(!marks.join("zincati.service").exists() && units.join("zincati.service.d/local.conf").exists());
        std::fs::remove_file(marks.join("a.timer")).unwrap();
        assert!(hold(&units, &dir, &[]).unwrap(), "also if an administrator has removed the mark");
        assert!(!hold(&units, &dir, &[]).unwrap());
        assert!(!units.join("a.timer.d").exists());
    }
}
