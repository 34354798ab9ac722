//! The phase machine: the only place that knows the order of the phases, what is persisted between
//! them, and when to try again.
//!
//! Each phase is a function from the previous phase's value to its own, so that a wrong order does
//! not compile; after each, the record is written, so that a daemon that was killed goes on where it
//! was. This room may call every other one except `bus` and `cli`.

mod after;
mod error;
mod fetch;
mod paths;
mod prepare;
mod record;
mod switch;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use node_image_pivot_generator::emit::TARGET_VARIABLE;

use crate::config::{ImageSource, Mode, Settings};
use crate::report::{LastError, State, Tracker};

pub use error::Error;
pub use paths::Paths;
pub use record::{Record, StagedRoot, Step, Switched};

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

/// The agent: one per machine, guarded by the daemon's socket.
pub struct Agent {
    context: Context,
    record: Mutex<Record>,
    cancel: std::sync::Mutex<CancellationToken>,
}

impl Agent {
    /// Takes up what an earlier run left under `paths`, or begins anew.
    ///
    /// # Errors
    /// A record that cannot be read: nothing was touched; the message names the file.
    pub fn open(settings: Settings, paths: Paths) -> anyhow::Result<Arc<Self>> {
        let mut record = Record::load(&paths)?;
        // Only the generator sets it, in a drop-in that goes with the first reload after the switch:
        // the record keeps what it says.
        if std::env::var_os(TARGET_VARIABLE).is_some() {
            record.bootstrap = true;
        }
        record.status.target.get_or_insert_with(|| settings.target.clone());
        if matches!(record.step, Step::Idle) {
            record.status.image = settings.image.as_ref().map(|source| match source {
                ImageSource::Image(spec) | ImageSource::Release(spec) => spec.clone(),
            });
        }
        let tracker = Tracker::new(record.status.clone());
        Ok(Arc::new(Self {
            context: Context { settings, tracker, paths },
            record: Mutex::new(record),
            cancel: std::sync::Mutex::default(),
        }))
    }

    /// The live status document.
    pub fn tracker(&self) -> &Tracker {
        &self.context.tracker
    }

    /// Goes as far as `goal`, from wherever the record stands; what is done already is not done
    /// again. Calls run one after the other.
    ///
    /// # Errors
    /// See [`Error`]: each variant says whether the running system was touched.
    pub async fn advance(&self, goal: Goal) -> Result<(), Error> {
        let mut record = self.record.lock().await;
        let cancel = self.arm_cancel();
        loop {
            let next = match self.next(&record, goal, &cancel).await {
                Ok(next) => next,
                Err(error) => {
                    self.tell(&error);
                    self.save(&mut record)?;
                    return Err(error);
                }
            };
            let Some(next) = next else { return Ok(()) };
            record.step = next;
            self.save(&mut record)?;
            info!("step reached: {}", record.step.name());
        }
    }

    /// The step after the one that stands in the record, or `None` when the goal is reached.
    async fn next(&self, record: &Record, goal: Goal, cancel: &CancellationToken) -> Result<Option<Step>, Error> {
        let context = &self.context;
        let next = match record.step.clone() {
            Step::Idle => match already_there(&context.settings) {
                Some(path) => {
                    context.tracker.update(|status| status.state = State::NothingToDo);
                    Step::NothingToDo { reason: format!("{} exists", path.display()) }
                }
                None => Step::Resolved(fetch::resolve(context, cancel).await?),
            },
            Step::NothingToDo { reason } => {
                info!(reason, "nothing to do");
                if goal == Goal::Finished && record.bootstrap {
                    after::isolate(context).await?;
                }
                return Ok(None);
            }
            Step::Resolved(image) => Step::Pulled(fetch::pull(context, image, cancel).await?),
            Step::Pulled(pulled) => Step::Staged(prepare::stage(context, pulled).await?),
            Step::Staged(_) if goal < Goal::Switched => return Ok(None),
            // Written before the first act: whoever finds it knows that the switch may be half done
            // and finishes it.
            Step::Staged(staged) => Step::Switching(staged),
            Step::Switching(staged) => Step::Switched(switch::switch(context, staged).await?),
            Step::Switched(switched) => Step::Refreshed(after::refresh(context, switched, record.flow()).await?),
            Step::Refreshed(_) if goal < Goal::Finished => return Ok(None),
            Step::Refreshed(switched) => Step::Finished(after::finish(context, switched).await?),
            Step::Finished(_) => return Ok(None),
        };
        Ok(Some(next))
    }

    /// All phases. The isolate belongs to the bootstrap flow only: on a system that has long booted,
    /// nothing that runs may be stopped.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn run(&self) -> Result<(), Error> {
        let bootstrap = self.record.lock().await.bootstrap;
        self.advance(if bootstrap { Goal::Finished } else { Goal::Switched }).await
    }

    /// Stops a pull that runs or waits. What the store already holds stays there for the next one.
    pub fn cancel(&self) {
        if let Ok(token) = self.cancel.lock() {
            token.cancel();
        }
    }

    /// Puts `/usr` and `/etc` back as they were before the switch and reports everything that could
    /// not be put back. Units that the node image started are not stopped in this version.
    ///
    /// # Errors
    /// [`Error::Refused`] when nothing was switched.
    pub async fn undo(&self) -> Result<Vec<String>, Error> {
        let mut record = self.record.lock().await;
        let staged = match record.step.clone() {
            Step::Switching(staged) => staged,
            Step::Switched(switched) | Step::Refreshed(switched) | Step::Finished(switched) => switched.staged,
            _ => return Err(Error::Refused("nothing was switched, so there is nothing to undo".into())),
        };
        let left = switch::undo(&self.context, &staged).await?;
        record.step = Step::Staged(staged);
        self.context.tracker.update(|status| status.state = State::Pulled);
        self.save(&mut record)?;
        Ok(left)
    }

    /// What the switch would change, as lines for a person; pulls and stages first if that was not
    /// done yet, which leaves the running system untouched.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn plan(&self) -> Result<Vec<String>, Error> {
        self.advance(Goal::Staged).await?;
        let record = self.record.lock().await;
        Ok(match &record.step {
            Step::Staged(staged) => staged.plan_lines(),
            Step::NothingToDo { reason } => vec![format!("nothing to do: {reason}")],
            _ => vec!["already switched".into()],
        })
    }

    /// A fresh token for this call; an earlier cancel must not end it.
    fn arm_cancel(&self) -> CancellationToken {
        let fresh = CancellationToken::new();
        if let Ok(mut token) = self.cancel.lock() {
            *token = fresh.clone();
        }
        fresh
    }

    /// Shows a failure in the status document, unless the phase has done so itself.
    fn tell(&self, error: &Error) {
        error!("{error}");
        let tracker = &self.context.tracker;
        if tracker.status().state != State::Failed {
            tracker.fail(LastError {
                class: error.class().into(),
                message: error.to_string(),
                attempt: 1,
                next_retry_unix: None,
            });
        }
    }

    fn save(&self, record: &mut Record) -> Result<(), Error> {
        record.status = self.context.tracker.status();
        record.save(&self.context.paths).map_err(Error::from)
    }
}

/// The first probe path that exists, unless the pivot is forced.
fn already_there(settings: &Settings) -> Option<&Path> {
    if settings.mode == Mode::Force {
        return None;
    }
    settings.probe_paths.iter().map(AsRef::as_ref).find(|path: &&Path| path.exists())
}
