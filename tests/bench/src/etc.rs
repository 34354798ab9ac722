//! Time of the merge of `/etc`.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde::Serialize;

/// Seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EtcTimes {
    /// Number of files. The new tree changes all of them.
    pub entries: usize,
    /// Three scans and the decisions.
    pub plan: f64,
    /// Writing all of them, with the record for undo.
    pub apply: f64,
    /// Putting all of them back.
    pub undo: f64,
}

/// Makes three trees in `scratch` and merges them.
pub fn measure(scratch: &Path, entries: usize) -> Result<EtcTimes> {
    for number in 0..entries {
        for (tree, content) in [("base", "1"), ("etc", "1"), ("new", "2")] {
            let dir = scratch.join(tree).join(format!("d{}", number % 300));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join(format!("f{number}")), content.repeat(2000))?;
        }
    }
    let open = |name: &str| etc_merge::open_dir(&scratch.join(name));
    let (base, new, current, undo) = (open("base")?, open("new")?, open("etc")?, scratch.join("undo"));
    let start = Instant::now();
    let plan = etc_merge::plan(base.as_fd(), new.as_fd(), current.as_fd(), &etc_merge::Defaults::default())?;
    let plan_seconds = start.elapsed().as_secs_f64();
    ensure!(plan.changes.len() == entries, "{} changes planned of {entries}", plan.changes.len());
    let start = Instant::now();
    etc_merge::apply(&plan, new.as_fd(), current.as_fd(), &undo)?;
    let apply = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let undone = etc_merge::undo(&undo, current.as_fd())?;
    ensure!(undone.restored == entries, "{} entries restored of {entries}", undone.restored);
    Ok(EtcTimes { entries, plan: plan_seconds, apply, undo: start.elapsed().as_secs_f64() })
}
