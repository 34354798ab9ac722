//! The phase machine: the only place that knows the order of the phases, what is persisted between
//! them, and when to try again.
//!
//! Each phase is a function from the previous phase's value to its own, so that a wrong order does
//! not compile; after each, the record is written, so that a daemon that was killed goes on where it
//! was. This room may call every other one except `bus` and `cli`.

mod after;
mod complete;
mod deadline;
mod error;
mod fetch;
mod hooks;
mod paths;
mod plan;
mod prepare;
mod probation;
mod record;
mod start;
mod storage;
mod switch;
mod ticket;
mod undo;
mod units;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use node_image_pivot_generator::emit::TARGET_VARIABLE;
use tokio::sync::{Mutex, watch};
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::dirfd::Directory;
use crate::report::{LastError, State, Tracker};
use crate::store::{LockError, StoreLock};
use crate::units::{Flow, Guard, Manager};
use start::{Start, decide};

pub use error::Error;
pub use paths::Paths;
pub use plan::{EtcPlan, MemoryPlan, PlanDocument, SwitchPlan};
pub use probation::Probation;
pub use record::{Record, StagedRoot, Step, Switched, Undo};
pub use ticket::{Ticket, Tickets};

/// Where the generator sends a boot.
const PIVOT_TARGET: &str = "node-image-pivot.target";

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
    /// Watches over us while `/usr` is not the one that PID 1 comes from.
    guard: Mutex<Option<Guard>>,
}

impl Context {
    pub(crate) fn new(settings: Settings, tracker: Tracker, paths: Paths) -> Self {
        Self { settings, tracker, paths, guard: Mutex::default() }
    }

    /// From here on PID 1 is re-executed should we die. Without a guard we go on: it is needed only if we are killed.
    async fn guard(&self) {
        let mut guard = self.guard.lock().await;
        if guard.is_none() {
            let started = tokio::task::spawn_blocking(Guard::start).await.map_err(anyhow::Error::from);
            *guard = started.and_then(|started| started).inspect_err(|error| warn!("{error:#}")).ok();
        }
    }

    /// Ends that.
    async fn unguard(&self) {
        drop(self.guard.lock().await.take());
    }
}

/// The agent: one per machine, which a lock in its directory sees to.
pub struct Agent {
    tracker: Tracker,
    paths: Paths,
    record: Mutex<Record>,
    /// Whether whoever holds the record undoes.
    undoing: AtomicBool,
    /// As in the record, for the watch over it.
    probation: watch::Sender<Option<Probation>>,
    tickets: Tickets,
    _lock: StoreLock,
}

impl Agent {
    /// Takes up what an earlier run left under `paths`, or begins anew. `bootstrap`: this boot goes to the pivot
    /// target, see [`is_bootstrap`].
    ///
    /// # Errors
    /// Another agent runs, or there is a record that cannot be read. Nothing was touched.
    pub fn open(paths: Paths, bootstrap: bool) -> anyhow::Result<Arc<Self>> {
        Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
        let lock = StoreLock::try_acquire(&paths.lock()).map_err(|error| match error {
            LockError::Held { path, holder } => anyhow!("another agent runs, {holder}; it holds {path}"),
            other => other.into(),
        })?;
        let mut record = Record::load(&paths)?;
        // The generator's drop-in goes with the first reload after the switch: the record keeps what it says.
        record.bootstrap |= bootstrap;
        record.rest();
        record.status.undo_unix = record.probation.and_then(undo_unix);
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
            undoing: AtomicBool::new(false),
            probation: watch::Sender::new(record.probation),
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
        self.advance_for(Some(goal), None, ticket).await
    }

    /// `goal`: the flow's own, unless there is one.
    async fn advance_for(&self, goal: Option<Goal>, length: Option<Duration>, ticket: &Ticket) -> Result<(), Error> {
        let mut record = tokio::select! {
            record = self.record.lock() => record,
            () = ticket.cancelled() => return Err(Error::Cancelled),
        };
        let outcome = self.advance_locked(&mut record, goal, length, ticket).await;
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

    async fn advance_locked(
        &self,
        record: &mut Record,
        goal: Option<Goal>,
        length: Option<Duration>,
        ticket: &Ticket,
    ) -> Result<(), Error> {
        if let Step::Undoing(_) = record.step {
            self.undo_locked(record).await?;
        }
        if length.is_some() && !record.step.is_before_switch() && record.probation.is_none_or(|until| until.kept) {
            return Err(Error::Refused("this system is switched already, for good; run undo before a try".into()));
        }
        // Read at each call: whoever mends the configuration need not restart anything.
        let settings = Settings::load().map_err(|error| {
            let standing = if record.step.is_before_switch() { "untouched" } else { "as the last call left it" };
            Error::Refused(format!("{error:#}; the running system is {standing}"))
        })?;
        let asked = record::asked(&settings);
        if record.step.is_before_switch() && record.asked.as_ref() != Some(&asked) {
            record.step = Step::Idle;
            record.asked = Some(asked);
            self.tracker.restart(record::shown(&settings));
        }
        let context = Context::new(settings, self.tracker.clone(), self.paths.clone());
        let goal = goal.unwrap_or_else(|| record.last_goal());
        loop {
            let touches_nothing_yet = record.step.is_before_switch() || matches!(record.step, Step::Refreshed(_));
            if touches_nothing_yet && ticket.is_cancelled() {
                return Err(Error::Cancelled);
            }
            match self.step(&context, record, goal, length, ticket).await {
                Ok(true) => info!("step reached: {}", record.step.name()),
                Ok(false) => return Ok(()),
                Err(error) => {
                    return Err(match record.step.clone() {
                        Step::Switching(staged) => self.roll_back(record, staged, error).await,
                        _ => error,
                    });
                }
            }
        }
    }

    /// One step on, which is in the record when this returns. Whether there was one.
    async fn step(
        &self,
        context: &Context,
        record: &mut Record,
        goal: Goal,
        length: Option<Duration>,
        ticket: &Ticket,
    ) -> Result<bool, Error> {
        let Some(next) = next(context, record, goal, ticket).await? else { return Ok(false) };
        let before = record.clone();
        if let (Step::Staged(_), Step::Switching(_)) = (&record.step, &next) {
            record.undone = None;
            // From before the first act: what cuts the network may be part of the switch.
            record.probation = length.map(Probation::begin);
            if let Some(probation) = record.probation
                && let Err(error) = deadline::arm(probation).await
            {
                *record = before;
                return Err(Error::from(error).context("the running system is untouched"));
            }
        }
        record.reach(next);
        if let Err(error) = self.save(record) {
            *record = before;
            if record.probation.is_none() {
                deadline::disarm().await;
            }
            return Err(match record.step {
                // What becomes of it is said by whoever rolls it back.
                Step::Switching(_) => error,
                Step::Switched(_) => {
                    error.context("/usr and /etc are switched: start node-image-overlay.service again, or run undo")
                }
                Step::Refreshed(_) => {
                    error.context("the isolation is under way all the same; start node-image-finish.service again")
                }
                _ => error.context("the running system is untouched"),
            });
        }
        Ok(true)
    }

    /// All phases of the flow; see [`Record::last_goal`].
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn run(&self, ticket: &Ticket) -> Result<(), Error> {
        self.advance_for(None, None, ticket).await
    }

    /// The same on probation: the switch is undone `length` after it began, unless [`Agent::keep`] is
    /// called before.
    ///
    /// # Errors
    /// As [`Agent::advance`]; refused on a system that is switched for good.
    pub async fn run_for(&self, length: Duration, ticket: &Ticket) -> Result<(), Error> {
        self.advance_for(None, Some(length), ticket).await
    }

    /// Ends every call that has not begun to switch, running or waiting; what the store already
    /// holds stays there for the next one. Returns whether there was any.
    pub fn cancel(&self) -> bool {
        self.tickets.cancel_all()
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
        self.show(record);
        record.save(&self.paths)?;
        self.probation.send_replace(record.probation);
        Ok(())
    }

    /// Brings the status document into the record and what follows from the record into the document.
    fn show(&self, record: &mut Record) {
        let undo_unix = record.probation.and_then(undo_unix);
        self.tracker.update(|status| status.undo_unix = undo_unix);
        record.status = self.tracker.status();
    }
}

/// Whether the generator redirected this boot. Its variable alone does not say so: whoever configures an image on a
/// system that has long booted, and then lets systemd reload, makes the generator set it, too. There nothing may
/// be isolated, as the pivot target is not what the machine goes to.
pub async fn is_bootstrap() -> bool {
    if std::env::var_os(TARGET_VARIABLE).is_none() {
        return false;
    }
    let asked = async { Manager::connect().await?.is_up_or_coming(PIVOT_TARGET).await };
    asked.await.unwrap_or_else(|error| {
        warn!("cannot tell whether this boot goes to {PIVOT_TARGET}, taken for granted: {error:#}");
        true
    })
}

/// When the probation ends, in seconds since the epoch; `None` for a switch that is kept.
fn undo_unix(probation: Probation) -> Option<u64> {
    let at = std::time::SystemTime::now() + probation.left()?;
    at.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
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
        Step::NothingToDo { reason, isolated: false } if goal == Goal::Finished && record.flow() == Flow::Bootstrap => {
            after::isolate(context).await?;
            Step::NothingToDo { reason, isolated: true }
        }
        Step::NothingToDo { .. } => return Ok(None),
        Step::Resolved(image) => Step::Pulled(fetch::pull(context, image, ticket).await?),
        Step::Pulled(pulled) => Step::Staged(
            prepare::stage(context, pulled, record.flow())
                .await
                .map_err(|error| error.context("the running system is untouched"))?,
        ),
        Step::Staged(_) if goal < Goal::Switched => return Ok(None),
        // Written before the first act: whoever finds it knows that the switch may be half done
        // and finishes it.
        Step::Staged(staged) => {
            switch::check(&context.paths)?;
            hooks::pre_switch(context, &staged, record.flow(), ticket).await?;
            units::remember(context).await?;
            Step::Switching(staged)
        }
        Step::Switching(staged) => Step::Switched(switch::switch(context, staged).await?),
        // Taken back to the end before anybody asks for a next step.
        Step::Undoing(_) => return Err(Error::Internal(anyhow!("undo is not complete, run it again"))),
        Step::Switched(switched) => {
            let refreshed = after::refresh(context, switched, record.flow()).await;
            let refreshed = refreshed.map_err(|error| {
                error.context(
                    "/usr and /etc are switched, the refresh is not complete: \
                     start node-image-overlay.service again, or run undo",
                )
            })?;
            hooks::post_switch(context, &refreshed.staged, record.flow()).await;
            Step::Refreshed(refreshed)
        }
        Step::Refreshed(_) if goal < Goal::Finished => return Ok(None),
        Step::Refreshed(switched) => Step::Finished(after::finish(context, switched, record.flow()).await?),
        Step::Finished(_) => return Ok(None),
    };
    Ok(Some(next))
}
