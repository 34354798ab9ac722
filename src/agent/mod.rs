//! The phase machine: the only place that knows the order of the phases, what is persisted between
//! them, and when to try again.
//!
//! Each phase is a function from the previous phase's value to its own, so that a wrong order does
//! not compile; after each, the record is written, so that a daemon that was killed goes on where it
//! was. This room may call every other one except `bus` and `cli`.

mod accounts;
mod auto_undo;
mod cancel;
mod deviations;
mod error;
mod holder;
mod hooks;
mod new_usr;
mod phases;
mod policy;
mod reexec;
mod retry;
mod staging;
mod state;
mod storage;
mod undo;
mod unit_jobs;
mod unit_survey;
mod views;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use boot_config::TARGET_VARIABLE;
use tokio::sync::{Mutex, MutexGuard, watch};
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::report::{Status, Tracker};
use deviations::Standing;
use holder::{Held, Holder};
use node_store::store::{LockError, StoreLock};
use phases::Below;
use phases::next;
use state::Asked;
use support::directory::Directory;
use unit_refresh::{Guard, Manager};

pub use auto_undo::Probation;
pub use cancel::{Ticket, Tickets};
pub use error::Error;
pub use state::{Paths, PlanDocument, Record, StagedRoot, Step, SwitchPlan, Switched, Undo};

/// The target to which the generator redirects a boot.
const PIVOT_TARGET: &str = "node-image-pivot.target";

/// The end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// Resolve, pull, stage: everything that leaves the running system untouched.
    Staged,
    /// Switch and refresh.
    Switched,
    /// Isolate to the original default target.
    Finished,
}

/// The surroundings of every phase.
pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) tracker: Tracker,
    pub(crate) paths: Paths,
    /// Watches over us while `/usr` is not the one that PID 1 comes from.
    guard: Mutex<Option<Guard>>,
    /// True once this call has staged: what it has just checked is not checked again.
    staged_now: AtomicBool,
}

impl Context {
    pub(crate) fn new(settings: Settings, tracker: Tracker, paths: Paths) -> Self {
        Self { settings, tracker, paths, guard: Mutex::default(), staged_now: AtomicBool::new(false) }
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
    holder: Holder,
    /// True while the holder of the record undoes.
    undoing: AtomicBool,
    /// As in the record, for those who do not wait for its lock.
    standing: watch::Sender<Standing>,
    /// False until it is known which way this boot goes; see [`is_bootstrap`].
    boot_known: AtomicBool,
    tickets: Tickets,
    /// Held by a download beside the pivot, which does not hold the record.
    download: Mutex<()>,
    /// Those of that download, which an undo cancels.
    download_tickets: Tickets,
    _lock: StoreLock,
}

impl Agent {
    /// Takes up what an earlier run left under `paths`, or starts afresh. `bootstrap`: true if this boot goes to the pivot
    /// target, `None` if that is not known yet; see [`is_bootstrap`].
    ///
    /// # Errors
    /// Another agent runs, or the agent's directory cannot be used. A record that cannot be used is not an error: the agent
    /// then says what is left, and allows an undo.
    pub fn open(paths: Paths, bootstrap: Option<bool>) -> anyhow::Result<Arc<Self>> {
        Directory::ensure(paths.run()).with_context(|| format!("cannot use {}", paths.run().display()))?;
        let lock = StoreLock::try_acquire(&paths.lock()).map_err(|error| match error {
            LockError::Held { path, holder } => anyhow!("another agent runs, {holder}; it holds {path}"),
            other => other.into(),
        })?;
        let mut record = state::open(&paths);
        if record.step.is_before_switch() {
            record.status.notes.extend(state::set_aside(&paths));
        }
        // The generator's drop-in goes with the first reload after the switch: the record keeps what it says.
        record.bootstrap |= bootstrap == Some(true);
        record.rest();
        record.status.undo_unix = record.probation.and_then(undo_unix);
        // The configuration is read again at each call; here it only fills in what status shows. What
        // is wrong with it is the answer to the call.
        if let Ok(settings) = Settings::load() {
            record.status.target.get_or_insert_with(|| settings.target.clone());
            if matches!(record.step, Step::Idle) {
                record.status.image = state::shown(&settings);
            }
        }
        Ok(Arc::new(Self {
            tracker: Tracker::new(record.status.clone()),
            paths,
            undoing: AtomicBool::new(false),
            standing: watch::Sender::new(Standing::of(&record)),
            boot_known: AtomicBool::new(bootstrap.is_some() || record.bootstrap),
            record: Mutex::new(record),
            holder: Holder::default(),
            tickets: Tickets::default(),
            download: Mutex::default(),
            download_tickets: Tickets::default(),
            _lock: lock,
        }))
    }

    /// The live status document.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Returns the status document together with what differs by now from a finished switch. Looks at the mount table
    /// and the configuration.
    pub fn status(&self) -> Status {
        let deviations = self.standing.borrow().deviations();
        Status { deviations, call: self.holder.call(), ..self.tracker.status() }
    }

    /// Returns the status document of the record under `paths`, for when no daemon runs.
    pub fn recorded_status(paths: &Paths) -> Status {
        let mut record = state::open(paths);
        let mut deviations = Standing::of(&record).deviations();
        if record.step.is_before_switch() {
            deviations.extend(state::unused(paths));
        } else {
            record.rest();
        }
        Status { deviations, ..record.status }
    }

    /// A ticket for `call`, which may be cancelled.
    pub fn ticket(&self, call: &'static str) -> Ticket {
        self.tickets.draw(call)
    }

    /// Goes as far as `goal`, from wherever the record stands; what is done already is not done
    /// again. Calls run one after the other. A cancelled ticket ends the call as long as the
    /// running system is untouched; a switch that has begun is finished.
    ///
    /// # Errors
    /// See [`Error`]: it says whether the running system was changed.
    pub async fn advance(&self, goal: Goal, ticket: &Ticket) -> Result<(), Error> {
        self.advance_for(Some(goal), None, ticket).await
    }

    /// `goal`: the flow's own, unless there is one.
    async fn advance_for(&self, goal: Option<Goal>, length: Option<Duration>, ticket: &Ticket) -> Result<(), Error> {
        let mut record = self.lock_for_phases(ticket).await?;
        let outcome = self.advance_locked(&mut record, goal, length, ticket).await;
        let outcome = outcome.map_err(|error| error.at(record.step.standing()));
        if let Err(error) = &outcome {
            self.tell(error);
            if record.step.is_before_switch() {
                // The next call asks again: the cause may have been the image itself, or a tag that
                // moved. What was stored is found again and not fetched twice.
                record.step = Step::Idle;
            }
            if let Err(error) = self.save(&mut record) {
                warn!("{error}");
            }
        }
        outcome?;
        // Not a failure of the pivot: the status stays that of the switch.
        let configured = Settings::load().ok().map(|settings| Asked::by(&settings));
        let other = deviations::other_image(record.asked.as_ref(), configured.as_ref());
        match other.filter(|_| !record.step.is_before_switch()) {
            Some(line) => Err(Error::refused("other-image", line)),
            None => Ok(()),
        }
    }

    /// Waits for the record, and for a download that writes to the store which the phases before the switch need.
    async fn lock_for_phases(&self, ticket: &Ticket) -> Result<Held<'_>, Error> {
        loop {
            let record = self.lock(ticket).await?;
            if !record.step.is_before_switch() || self.download.try_lock().is_ok() {
                return Ok(record);
            }
            drop(record);
            tokio::select! {
                _ = self.download.lock() => {}
                () = ticket.cancelled() => return Err(Error::cancelled()),
            }
        }
    }

    /// Waits for the record.
    async fn lock(&self, ticket: &Ticket) -> Result<Held<'_>, Error> {
        tokio::select! {
            record = self.record.lock() => Ok(self.holder.hold(record, ticket.call())),
            () = ticket.cancelled() => Err(Error::cancelled()),
        }
    }

    async fn advance_locked(
        &self,
        record: &mut Record,
        goal: Option<Goal>,
        length: Option<Duration>,
        ticket: &Ticket,
    ) -> Result<(), Error> {
        if let Step::Undoing(_) = record.step {
            self.undo_locked(record, Below::Unmount).await?;
        }
        if let Step::Lost { message, .. } = &record.step {
            return Err(Error::refused("lost-record", message.clone()));
        }
        if !self.boot_known.load(Ordering::Acquire)
            && let Some(bootstrap) = is_bootstrap().await
        {
            self.boot_known.store(true, Ordering::Release);
            record.bootstrap |= bootstrap;
        }
        if length.is_some() && !record.step.is_before_switch() && record.probation.is_none_or(|until| until.kept) {
            return Err(Error::refused("switched", "this system is switched already; run undo before a try"));
        }
        // Read at each call, so that a corrected configuration needs no restart.
        let settings = Settings::load().map_err(|error| Error::refused("configuration", format!("{error:#}")))?;
        let asked = Asked::by(&settings);
        if record.step.is_before_switch() && record.asked.as_ref() != Some(&asked) {
            record.step = Step::Idle;
            record.asked = Some(asked);
            self.tracker.restart(state::shown(&settings));
        }
        let context = Context::new(settings, self.tracker.clone(), self.paths.clone());
        let goal = goal.unwrap_or_else(|| record.last_goal());
        loop {
            let touches_nothing_yet = record.step.is_before_switch() || matches!(record.step, Step::Refreshed(_));
            if touches_nothing_yet && ticket.is_cancelled() {
                return Err(Error::cancelled());
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
                && let Err(error) = auto_undo::arm(probation).await
            {
                *record = before;
                return Err(error.into());
            }
        }
        record.reach(next);
        if let Err(error) = self.save(record) {
            *record = before;
            if record.probation.is_none() {
                auto_undo::disarm().await;
            }
            return Err(error);
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
    /// As [`Agent::advance`]; refused on a system that is switched permanently.
    pub async fn run_for(&self, length: Duration, ticket: &Ticket) -> Result<(), Error> {
        self.advance_for(None, Some(length), ticket).await
    }

    /// Ends every call that has not begun to switch, running or waiting; what the store already
    /// holds stays there for the next one. Returns whether there was any.
    pub fn cancel(&self) -> bool {
        self.tickets.cancel_all()
    }

    /// Cancels all calls that may be cancelled, waits for a switch or an undo that is under way, and keeps every other
    /// call from beginning for as long as the returned value lives.
    pub async fn stop(&self) -> Stopped<'_> {
        self.tickets.cancel_all();
        Stopped(self.record.lock().await)
    }

    /// Logs a failure and shows it in the status document.
    fn tell(&self, error: &Error) {
        error!("{error}");
        self.show_failure(error);
    }

    /// Shows a failure in the status document, with the attempts of a phase that counted them.
    fn show_failure(&self, error: &Error) {
        self.tracker.fail(error.last_error());
    }

    fn save(&self, record: &mut Record) -> Result<(), Error> {
        self.show(record);
        record.save(&self.paths)?;
        self.standing.send_replace(Standing::of(record));
        Ok(())
    }

    /// Brings the status document into the record and what follows from the record into the document.
    fn show(&self, record: &mut Record) {
        let undo_unix = record.probation.and_then(undo_unix);
        self.tracker.update(|status| status.undo_unix = undo_unix);
        record.status = self.tracker.pivot_status();
    }
}

/// An agent that begins nothing any more.
pub struct Stopped<'a>(MutexGuard<'a, Record>);

impl Stopped<'_> {
    /// Returns true if a switch or an undo is left unfinished, which the next daemon goes on with.
    pub fn is_unfinished(&self) -> bool {
        matches!(self.0.step, Step::Switching(_) | Step::Undoing(_) | Step::Switched(_))
    }
}

/// Returns true if the generator redirected this boot, `None` if systemd cannot be asked. The generator's variable alone
/// does not tell: an administrator who configures an image on a system that has long booted, and then lets systemd
/// reload, makes the generator set it, too. Nothing may be isolated there.
///
/// A boot that is not known counts as live, which stops nothing; the next phase asks again, and the one that isolates
/// cannot do so before systemd answers.
pub async fn is_bootstrap() -> Option<bool> {
    if std::env::var_os(TARGET_VARIABLE).is_none() {
        return Some(false);
    }
    let asked = async { Manager::connect().await?.is_active_or_queued(PIVOT_TARGET).await };
    asked
        .await
        .inspect_err(|error| warn!("cannot tell if this boot goes to {PIVOT_TARGET}, asking again later: {error:#}"))
        .ok()
}

/// When the probation ends, in seconds since the epoch; `None` for a switch that is kept.
fn undo_unix(probation: Probation) -> Option<u64> {
    let at = std::time::SystemTime::now() + probation.left()?;
    at.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
}
