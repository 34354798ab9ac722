//! The record that is kept between phases, in `/run/node-image-pivot/state.json`.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{StateDir, StateFile, Step, SwitchStep, Unusable};
use crate::agent::Goal;
use crate::agent::auto_undo::TrialPeriod;
use crate::agent::boot::Boot;
use crate::config::{ImageSource, Settings};
use crate::report::{LastError, Standing, State, Status};
use support::failpoint::{self, Point};
use unit_refresh::Flow;

/// Request of the configuration. If it changes, the results of the phases before the switch are invalid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Image; `None` when the configuration names none.
    pub source: Option<ImageSource>,
    /// The names under which a release payload may list the node image.
    pub image_tags: Option<Vec<String>>,
    /// All other settings that decide how the image is staged, for comparison only.
    how: String,
}

impl Asked {
    /// Returns the request of `settings`.
    pub fn by(settings: &Settings) -> Self {
        let Settings { image, mode, etc_strategy, os_mismatch, store, complete, .. } = settings;
        let release = matches!(image, Some(ImageSource::Release(_)));
        Self {
            source: image.clone(),
            image_tags: settings.image_tags.clone().filter(|_| release),
            how: format!("{:?}", (mode, etc_strategy, os_mismatch, store.place, complete)),
        }
    }
}

/// The image that the status document shows as asked for.
pub(in crate::agent) fn shown(settings: &Settings) -> Option<String> {
    settings.image.as_ref().map(|source| source.spec().to_string())
}

/// The record.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// The last completed step.
    pub step: Step,
    /// Steps of the switch, or of the undo, that have begun, in their order.
    pub(in crate::agent) begun: Vec<SwitchStep>,
    /// True if the generator redirected this boot.
    pub bootstrap: bool,
    /// True once the agent has isolated to the default target. The machine is in use from then on, also after an undo.
    arrived: bool,
    /// The request of the configuration when the step was reached.
    pub asked: Option<Asked>,
    /// The trial period after which the switch is undone unless an administrator keeps it.
    pub trial: Option<TrialPeriod>,
    /// Entries that the last undo kept deliberately, for a caller that asks again before the next switch.
    pub undone: Option<Vec<String>>,
    /// The status document as it was last saved.
    pub status: Status,
}

impl StateFile for Record {
    const NAME: &'static str = "state.json";
    const SUBJECT: &'static str = "the record";
    const REMEDY: &'static str = "nothing is switched, and the agent begins without it";
}

impl Record {
    /// Returns a record at `step` without further facts.
    pub(in crate::agent) fn at(step: Step) -> Self {
        Self { step, ..Self::default() }
    }

    /// Sets the trial period.
    pub(in crate::agent) fn with(self, trial: Option<TrialPeriod>) -> Self {
        Self { trial, ..self }
    }

    /// Loads the record.
    ///
    /// # Errors
    /// It is missing or cannot be used. The file is left unchanged.
    pub fn load(dir: &StateDir) -> Result<Self, Unusable> {
        dir.load()
    }

    /// Replaces the file atomically.
    pub fn save(&self, dir: &StateDir) -> Result<()> {
        failpoint::hit(Point::Record, self.step.name())
            .with_context(|| format!("cannot write {}", dir.run().join(Self::NAME).display()))?;
        dir.save(self, self.step.image()).map(drop)
    }

    /// Replaces the file with a record that says that the running system is unchanged. If the disk is full, removes the old
    /// file first: without a record an agent begins again, with the old one it would not.
    pub fn save_over(&self, dir: &StateDir) -> Result<()> {
        self.save(dir).or_else(|_| {
            dir.remove(Self::NAME)?;
            self.save(dir)
        })
    }

    /// Lists a step of the switch or the undo before its first act.
    ///
    /// # Errors
    /// The file is unchanged.
    pub(in crate::agent) fn begin(&mut self, step: SwitchStep, dir: &StateDir) -> Result<()> {
        self.begun.retain(|begun| *begun != step);
        self.begun.push(step);
        self.save(dir)
    }

    /// Sets the status of a daemon that has just started and runs no phase.
    pub fn rest(&mut self) {
        // A failure stays until the next attempt. A planned attempt ended with the daemon.
        let failed = self.status.error.as_ref().is_some_and(|error| error.next_retry_unix.is_none());
        let at = self.begun.last().map_or_else(String::new, |step| format!(" at {}", step.describe()));
        let interrupted = match &self.step {
            Step::Switching(_) => Some(format!(
                "the switch was interrupted{at}: start node-image-overlay.service again to finish it, or run undo"
            )),
            Step::Undoing(_) => Some(format!("undo was interrupted{at}: run it again")),
            Step::Lost { message, .. } => Some(message.clone()),
            _ => None,
        };
        if let Some(message) = interrupted {
            self.status.error.get_or_insert_with(|| LastError {
                class: "interrupted".into(),
                message,
                attempt: 1,
                standing: Some(Standing::HalfDone),
                ..LastError::default()
            });
        } else if !failed {
            self.status.error = None;
        }
        self.status.state = if failed { State::Failed } else { self.step.resting_state() };
    }

    /// Takes note of the kind of this boot. Returns false if systemd must be asked again.
    pub fn learn(&mut self, boot: Boot) -> bool {
        self.bootstrap |= boot == Boot::Bootstrap;
        self.bootstrap || boot != Boot::Unknown
    }

    /// Sets the step.
    pub fn reach(&mut self, step: Step) {
        self.arrived |= step.is_arrival();
        self.step = step;
    }

    /// Returns the flow of the pivot. The bootstrap flow ends with the isolation to the default target.
    pub fn flow(&self) -> Flow {
        if self.bootstrap && !self.arrived { Flow::Bootstrap } else { Flow::Live }
    }

    /// Returns the goal of a run. Only the bootstrap flow isolates, because running units of a system in use must not be
    /// stopped.
    pub fn last_goal(&self) -> Goal {
        match self.flow() {
            Flow::Bootstrap => Goal::Finished,
            Flow::Live => Goal::Switched,
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
pub(in crate::agent) mod tests;
