//! The phase machine: the only place that knows the order of the phases, what is persisted between
//! them, and when to try again.
//!
//! Each phase is a function from the previous phase's value to its own, so that a wrong order does
//! not compile; after each, the record is written, so that a daemon that was killed goes on where it
//! was. This room may call every other one except `bus` and `cli`.

mod after;
mod complete;
mod error;
mod fetch;
mod paths;
mod plan;
mod prepare;
mod record;
mod storage;
mod switch;
mod ticket;

use std::path::Path;
use std::sync::Arc;

use node_image_pivot_generator::emit::TARGET_VARIABLE;
use tokio::sync::Mutex;
use tracing::{error, info, warn};

use crate::config::{Mode, Settings};
use crate::report::{LastError, State, Tracker};
use crate::store::StoreLock;

pub use error::Error;
pub use paths::Paths;
pub use plan::{EtcPlan, MemoryPlan, PlanDocument, SwitchPlan};
pub use record::{Record, StagedRoot, Step, Switched};
pub use ticket::{Ticket, Tickets};

/// How far to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// Resolve, pull, stage: everything that leaves the running system untouched.
    Staged,
    /// Switch and refresh.
    Switched,
    /// Isolate to the original default target.
    Finished,
}

/// What every phase sees.
pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) tracker: Tracker,
    pub(crate) paths: Paths,
}

/// The agent: one per machine, which a lock in its directory sees to.
pub struct Agent {
    tracker: Tracker,
    paths: Paths,
    /// Whether the generator redirected this boot.
    bootstrap: bool,
    record: Mutex<Record>,
    tickets: Tickets,
    _lock: StoreLock,
}

impl Agent {
    /// Takes up what an earlier run left under `paths`, or begins anew.
    ///
    /// # Errors
    /// Another agent runs, or there is a record that cannot be read. Nothing was touched.
    pub fn open(paths: Paths) -> anyhow::Result<Arc<Self>> {
        let mut record = Record::load(&paths)?;
        let lock = StoreLock::try_acquire(&paths.lock())?;
        // Only the generator sets it, in a drop-in that goes with the first reload after the switch:
        // the record keeps what it says.
        record.bootstrap |= std::env::var_os(TARGET_VARIABLE).is_some();
        record.rest();
        // The configuration is read anew at each call; here it only fills in what status shows. What
        // is wrong with it is the answer to the call.
        if let Ok(settings) = Settings::load() {
            record.status.target.get_or_insert_with(|| settings.target.clone());
            if matches!(record.step, Step::Idle) {
                record.status.image = record::shown(&settings);
            }
        }
        Ok(Arc::new(Self {
            tracker: Tracker::new(record.status.clone()),
            paths,
            bootstrap: record.bootstrap,
            record: Mutex::new(record),
            tickets: Tickets::default(),
            _lock: lock,
        }))
    }

    /// The live status document.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// A ticket for a call that may be cancelled.
    pub fn ticket(&self) -> Ticket {
        self.tickets.draw()
    }

    /// Goes as far as `goal`, from wherever the record stands; what is done already is not done
    /// again. Calls run one after the other. A cancelled ticket ends the call as long as the
    /// running system is untouched; a switch that has begun is finished.
    ///
    /// # Errors
    /// See [`Error`]: each variant says whether the running system was touched.
    pub async fn advance(&self, goal: Goal, ticket: &Ticket) -> Result<(), Error> {
        let mut record = tokio::select! {
            record = self.record.lock() => record,
            () = ticket.cancelled() => return Err(Error::Cancelled),
        };
        let outcome = self.advance_locked(&mut record, goal, ticket).await;
        if let Err(error) = &outcome {
            self.tell(error);
            if record.step.is_before_switch() {
                // The next call asks anew: the cause may have been the image itself, or a tag that
                // moved. What was stored is found again and not fetched twice.
                record.step = Step::Idle;
            }
            if let Err(error) = self.save(&mut record) {
                warn!("{error}");
            }
        }
        outcome
    }

    async fn advance_locked(&self, record: &mut Record, goal: Goal, ticket: &Ticket) -> Result<(), Error> {
        // Read at each call: whoever mends the configuration need not restart anything.
        let settings =
            Settings::load().map_err(|error| Error::Refused(format!("{error:#}; the running system is untouched")))?;
        let asked = record::asked(&settings);
        if record.step.is_before_switch() && record.asked.as_ref() != Some(&asked) {
            record.step = Step::Idle;
            record.asked = Some(asked);
            self.tracker.restart(record::shown(&settings));
        }
        let context = Context { settings, tracker: self.tracker.clone(), paths: self.paths.clone() };
        loop {
            let touches_nothing_yet = record.step.is_before_switch() || matches!(record.step, Step::Refreshed(_));
            if touches_nothing_yet && ticket.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let Some(next) = next(&context, record, goal, ticket).await? else { return Ok(()) };
            let before = std::mem::replace(&mut record.step, next);
            if let Err(error) = self.save(record) {
                record.step = before;
                return Err(error);
            }
            info!("step reached: {}", record.step.name());
        }
    }

    /// All phases. The isolate belongs to the bootstrap flow only: on a system that has long booted,
    /// nothing that runs may be stopped.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn run(&self, ticket: &Ticket) -> Result<(), Error> {
        self.advance(if self.bootstrap { Goal::Finished } else { Goal::Switched }, ticket).await
    }

    /// Ends every call that has not begun to switch, running or waiting; what the store already
    /// holds stays there for the next one. Returns whether there was any.
    pub fn cancel(&self) -> bool {
        self.tickets.cancel_all()
    }

    /// Puts `/usr` and `/etc` back as they were before the switch, and restarts what runs
    /// the node image's code. Returns what stays on purpose, a line each. Units that the node image started are
    /// not stopped.
    ///
    /// # Errors
    /// [`Error::Refused`] when nothing was switched, or something is under way;
    /// [`Error::Internal`] with everything that could not be put back: undo can be called again.
    pub async fn undo(&self) -> Result<Vec<String>, Error> {
        let Ok(mut record) = self.record.try_lock() else {
            return Err(Error::Refused("a phase is under way: wait for it, or cancel it first".into()));
        };
        let staged = match record.step.clone() {
            Step::Switching(staged) => staged,
            Step::Switched(switched) | Step::Refreshed(switched) | Step::Finished(switched) => switched.staged,
            _ => return Err(Error::Refused("nothing was switched, so there is nothing to undo".into())),
        };
        // Half of an undo is like half of a switch, for whoever finds the record.
        record.step = Step::Switching(staged.clone());
        self.save(&mut record)?;
        let undone = switch::undo(&self.paths, &staged, record.flow()).await;
        if !undone.failed.is_empty() {
            let error =
                Error::Internal(anyhow::anyhow!("undo is not complete, run it again: {}", undone.failed.join("; ")));
            self.tell(&error);
            if let Err(error) = self.save(&mut record) {
                warn!("{error}");
            }
            return Err(error);
        }
        record.step = Step::Staged(staged);
        self.tracker.update(|status| {
            status.state = State::Pulled;
            status.phase = Some(crate::report::Phase::Stage);
            status.error = None;
            status.timeline.retain(|entry| entry.phase <= crate::report::Phase::Stage);
        });
        self.save(&mut record)?;
        Ok(undone.kept)
    }

    /// What the switch would change; pulls and stages first if that was not done yet, which leaves the
    /// running system untouched.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn plan(&self, ticket: &Ticket) -> Result<PlanDocument, Error> {
        self.stage_anew(ticket).await?;
        let record = self.record.lock().await;
        Ok(match &record.step {
            Step::Staged(_) => PlanDocument::staged(SwitchPlan::load(&self.paths)?),
            Step::NothingToDo { reason, .. } => PlanDocument::without_plan("nothing-to-do", Some(reason.clone())),
            _ => PlanDocument::without_plan("switched", None),
        })
    }

    /// Stages, again if that was done: `/etc`, the mounts and free memory may be others by now.
    async fn stage_anew(&self, ticket: &Ticket) -> Result<(), Error> {
        {
            let mut record = self.record.lock().await;
            if let Step::Staged(staged) = &record.step {
                record.step = Step::Pulled(staged.pulled.clone());
            }
        }
        self.advance(Goal::Staged, ticket).await
    }

    /// What the switch would change in `/etc`, as a unified diff; pulls and stages first, like [`Agent::plan`].
    /// What not everybody may read is only named, unless `secrets`. Empty when nothing is to be done.
    ///
    /// # Errors
    /// As [`Agent::advance`]; [`Error::Refused`] after the switch.
    pub async fn diff_etc(&self, secrets: bool, ticket: &Ticket) -> Result<Vec<u8>, Error> {
        self.stage_anew(ticket).await?;
        // Held until the end: nobody may switch under us.
        let record = self.record.lock().await;
        let staged = match &record.step {
            Step::Staged(staged) => staged.clone(),
            Step::NothingToDo { .. } => return Ok(Vec::new()),
            _ => return Err(Error::Refused("already switched: /etc is merged; see the report of the switch".into())),
        };
        let paths = self.paths.clone();
        let diff = tokio::task::spawn_blocking(move || prepare::diff_etc(&paths, &staged, secrets)).await;
        Ok(diff.map_err(anyhow::Error::from)??)
    }

    /// Shows a failure in the status document, with the attempts of a phase that counted them.
    fn tell(&self, error: &Error) {
        error!("{error}");
        let attempt = match error {
            Error::GaveUp { attempts, .. } => *attempts,
            _ => 1,
        };
        self.tracker.fail(LastError {
            class: error.class().into(),
            message: error.to_string(),
            attempt,
            next_retry_unix: None,
        });
    }

    fn save(&self, record: &mut Record) -> Result<(), Error> {
        record.status = self.tracker.status();
        record.save(&self.paths).map_err(Error::from)
    }
}

/// The step after the one that stands in the record, or `None` when the goal is reached.
async fn next(context: &Context, record: &Record, goal: Goal, ticket: &Ticket) -> Result<Option<Step>, Error> {
    let next = match record.step.clone() {
        Step::Idle => match decide(&context.settings, &|path| path.exists()) {
            Start::Refuse => {
                return Err(Error::Refused(
                    "the mode is \"off\" (node-image-pivot= on the kernel command line, or `mode` in a drop-in file); \
                     nothing was done"
                        .into(),
                ));
            }
            Start::NothingToDo(reason) => {
                context.tracker.update(|status| status.state = State::NothingToDo);
                Step::NothingToDo { reason, isolated: false }
            }
            Start::Go => Step::Resolved(fetch::resolve(context, ticket).await?),
        },
        Step::NothingToDo { reason, isolated: false } if goal == Goal::Finished && record.bootstrap => {
            after::isolate(context).await?;
            Step::NothingToDo { reason, isolated: true }
        }
        Step::NothingToDo { .. } => return Ok(None),
        Step::Resolved(image) => Step::Pulled(fetch::pull(context, image, ticket).await?),
        Step::Pulled(pulled) => Step::Staged(
            prepare::stage(context, pulled).await.map_err(|error| error.context("the running system is untouched"))?,
        ),
        Step::Staged(_) if goal < Goal::Switched => return Ok(None),
        // Written before the first act: whoever finds it knows that the switch may be half done
        // and finishes it.
        Step::Staged(staged) => Step::Switching(staged),
        Step::Switching(staged) => Step::Switched(switch::switch(context, staged).await?),
        Step::Switched(switched) => {
            let refreshed = after::refresh(context, switched, record.flow()).await;
            Step::Refreshed(refreshed.map_err(|error| {
                error.context(
                    "/usr and /etc are switched, the refresh is not complete: \
                     start node-image-overlay.service again, or run undo",
                )
            })?)
        }
        Step::Refreshed(_) if goal < Goal::Finished => return Ok(None),
        Step::Refreshed(switched) => Step::Finished(after::finish(context, switched).await?),
        Step::Finished(_) => return Ok(None),
    };
    Ok(Some(next))
}

/// What a pivot that has not begun should do.
#[derive(Debug, PartialEq, Eq)]
enum Start {
    Go,
    NothingToDo(String),
    Refuse,
}

fn decide(settings: &Settings, exists: &dyn Fn(&Path) -> bool) -> Start {
    match settings.mode {
        Mode::Off => Start::Refuse,
        Mode::Force => Start::Go,
        Mode::Auto => match settings.probe_paths.iter().find(|path| exists(path)) {
            Some(path) => Start::NothingToDo(format!("{} exists", path.display())),
            None => Start::Go,
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn whether_to_start() {
        let settings = |line: &str| Settings::load_from(Path::new("/nonexistent"), line).unwrap();
        let has_oc = |path: &Path| path == Path::new("/usr/bin/oc");
        let base_only = |_: &Path| false;
        assert_eq!(decide(&settings(""), &base_only), Start::Go);
        assert_eq!(decide(&settings(""), &has_oc), Start::NothingToDo("/usr/bin/oc exists".into()));
        assert_eq!(decide(&settings("node-image-pivot=force"), &has_oc), Start::Go);
        assert_eq!(decide(&settings("node-image-pivot=off"), &base_only), Start::Refuse);
    }
}
