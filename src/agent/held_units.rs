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
    if held.is_empty() {
        return Ok(());
    }
    write(Path::new(UNITS), dir, &held).context("cannot hold back units that may end the boot")?;
    manager.reload().await?;
    for Action { unit, class, reason, .. } in &held {
        info!("{unit}: {}: {reason}", class.as_str());
    }
    let names: Vec<_> = held.iter().map(|action| action.unit.as_str()).collect();
    tracker.note(format!("held back until the next boot: {}", names.join(" ")));
    Ok(())
}

/// Permits systemd to start the units again.
pub(super) fn release(dir: &StateDir) -> Result<()> {
    dir.remove(StateDir::HELD)
}

/// Writes a mark and a drop-in for each unit, and removes the marks of an earlier call.
fn write(units: &Path, dir: &StateDir, held: &[Action]) -> Result<()> {
    release(dir)?;
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
    Ok(())
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
        write(&units, &dir, &held).unwrap();
        write(&units, &dir, &held[1..]).unwrap();
        let marks = dir.run().join("held-units");
        for action in &held {
            let text = std::fs::read_to_string(units.join(format!("{}.d/{DROP_IN}", action.unit))).unwrap();
            let mark = marks.join(&action.unit);
            assert!(text.ends_with(&format!("[Unit]\nConditionPathExists=!{}\n", mark.display())), "{text}");
        }
        assert!(!marks.join("zincati.service").exists(), "permitted since");
        assert_eq!(std::fs::read_to_string(marks.join("a.timer")).unwrap(), "r\n");
        release(&dir).unwrap();
        release(&dir).unwrap();
        assert!(!marks.exists());
    }
}
