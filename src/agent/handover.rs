//! The hand-over to another agent: the node image's after a switch, the bootimage's after an undo.
//!
//! The switch and the undo replace the program of a running agent. The program in place must serve the next calls, because
//! it belongs to the running system. It takes over by a restart of the unit, if it can continue from the record.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{info, warn};

use super::state::{Unusable, if_present};
use super::{Agent, Record, StateDir, Step, Stopped, SwitchPlan, unit_jobs::UnitsRecord};
use support::command;
use unit_refresh::{Flow, Manager, Verb};

/// The agent's unit.
const UNIT: &str = "node-image-pivotd.service";
/// The running program.
const RUNNING: &str = "/proc/self/exe";
/// Time limit for the check by the other program.
const LIMIT: Duration = Duration::from_secs(30);

/// Device, inode, size and time of a change. They differ if another file is in place.
type Identity = (u64, u64, u64, i64);

/// The program that a restart of the unit would run.
pub struct Program {
    path: PathBuf,
    /// The file that was compared with the running program.
    seen: Option<Identity>,
}

impl Program {
    /// Returns the program of this process, or `None` if it was not started by its absolute path, as systemd does.
    pub fn of_this_process() -> Option<Self> {
        let path = PathBuf::from(std::env::args_os().next()?);
        path.is_absolute().then(|| Self { seen: identity(&path), path })
    }

    /// Returns true, once for each file, if the file in place is another program than the running one. A missing file is
    /// not another program.
    fn is_replaced(&mut self) -> bool {
        let now = identity(&self.path);
        if now.is_none() || now == self.seen {
            return false;
        }
        self.seen = now;
        // A file that cannot be read is left for the check.
        !same_content(&self.path, Path::new(RUNNING)).unwrap_or(false)
    }
}

fn identity(path: &Path) -> Option<Identity> {
    fs::metadata(path).ok().map(|file: Metadata| (file.dev(), file.ino(), file.len(), file.ctime()))
}

fn same_content(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let mut left = one.metadata()?.len();
    if left != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut here, mut there) = ([0; 1 << 14], [0; 1 << 14]);
    while left > 0 {
        let size = here.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        one.read_exact(&mut here[..size])?;
        other.read_exact(&mut there[..size])?;
        if here[..size] != there[..size] {
            return Ok(false);
        }
        left -= size as u64;
    }
    Ok(true)
}

/// Checks that this agent can continue from the record and the plans under `paths`.
///
/// # Errors
/// A file cannot be used, for example because an agent with another format wrote it.
pub fn check_record(paths: &StateDir) -> Result<(), Unusable> {
    if_present(Record::load(paths))?;
    if_present(paths.load::<SwitchPlan>())?;
    if_present(paths.load::<etc_merge::Plan>())?;
    if_present(paths.load::<UnitsRecord>()).map(drop)
}

impl Agent {
    /// Hands over if another program is in place and can continue. Returns a value that keeps calls waiting until systemd
    /// ends this process. The callers then repeat their calls to the other agent.
    pub async fn hand_over(&self, program: &mut Program) -> Option<Stopped<'_>> {
        let rest = self.at_rest()?;
        if !program.is_replaced() {
            return None;
        }
        let path = program.path.display().to_string();
        if let Err(error) = command::run(&[&path, "daemon", "--check"], LIMIT).await {
            self.tracker.warn(format!(
                "the agent of the /usr in place cannot take over, and this one continues: {error:#}; do not restart {UNIT}"
            ));
            return None;
        }
        info!("handing over to {path}, the agent of the /usr in place");
        tokio::spawn(async {
            let restarted = async { Manager::connect().await?.run(Verb::TryRestart, UNIT, Manager::JOB_TIMEOUT).await };
            if let Err(error) = restarted.await {
                warn!("cannot hand over to the agent of the /usr in place: {error:#}; restart {UNIT}");
            }
        });
        Some(rest)
    }

    /// Locks the record if no call runs or waits, and a switch or an undo is complete. A bootstrap boot is not complete
    /// before the isolation, and a switch on trial is not complete: its undo must be that of the agent that made it.
    fn at_rest(&self) -> Option<Stopped<'_>> {
        let record = self.record.try_lock().ok()?;
        let complete = match &record.step {
            Step::Refreshed(_) | Step::Finished(_) if record.trial.is_some_and(|trial| !trial.kept) => false,
            Step::Refreshed(_) => record.flow() == Flow::Live,
            Step::Finished(_) => true,
            step => step.is_before_switch() && record.undone.is_some(),
        };
        (complete && !self.cancel_handles.any()).then_some(Stopped(record))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn another_program_is_seen_once() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("agent");
        fs::copy(RUNNING, &path).unwrap();
        let mut program = Program { seen: identity(&path), path: path.clone() };
        assert!(!program.is_replaced(), "the file of the start");
        let replace = |text: &[u8]| {
            let new = temp.path().join("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &path).unwrap();
        };
        let own = fs::read(RUNNING).unwrap();
        replace(&own);
        assert!(!program.is_replaced(), "the same content");
        let mut other = own.clone();
        *other.last_mut().unwrap() ^= 1;
        replace(&other);
        assert!(program.is_replaced());
        assert!(!program.is_replaced(), "seen already");
        replace(b"#!/bin/sh\n");
        assert!(program.is_replaced());
        fs::remove_file(&path).unwrap();
        assert!(!program.is_replaced(), "missing");
    }

    #[test]
    fn a_record_of_another_format_is_refused_with_instructions() {
        let temp = tempfile::tempdir().unwrap();
        let paths = StateDir::below(temp.path());
        assert_eq!(check_record(&paths), Ok(()), "no record");
        Record::default().save(&paths).unwrap();
        assert_eq!(check_record(&paths), Ok(()));
        let file = temp.path().join("state.json");
        let own = fs::read_to_string(&file).unwrap();
        for format in ["1", "3"] {
            fs::write(&file, own.replace("\"schema\": 2", &format!("\"schema\": {format}"))).unwrap();
            let message = check_record(&paths).unwrap_err().to_string();
            assert!(message.contains(&format!("format {format}, and this agent reads 2: another agent")), "{message}");
        }
    }
}
