//! Calls that end before the switch: pull, plan and diff-etc.

use tracing::info;

use super::state::{self, Asked};
use super::{Agent, Context, Error, Goal, PlanDocument, Step, SwitchPlan, Ticket, phases};
use crate::config::Settings;

impl Agent {
    /// Resolves, pulls and stages. What an earlier call has staged is used again as long as the pull spec stands for the
    /// same image; a tag is resolved at each call.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn pull(&self, ticket: &Ticket) -> Result<(), Error> {
        self.resolve_again(ticket).await?;
        self.advance(Goal::Staged, ticket).await
    }

    /// Goes back to the pull if a tag stands for another image by now. A failure leaves everything in place.
    async fn resolve_again(&self, ticket: &Ticket) -> Result<(), Error> {
        let mut record = self.lock_for_phases(ticket).await?;
        let Some(old) = record.step.pulled_image().cloned() else { return Ok(()) };
        // A configuration that is broken or asks for something else is the business of the call that follows.
        let Ok(settings) = Settings::load() else { return Ok(()) };
        let asked = Asked::by(&settings);
        if record.asked.as_ref() != Some(&asked) || asked.source.as_ref().is_some_and(|source| source.is_pinned()) {
            return Ok(());
        }
        let before = self.tracker.status();
        let context = Context::new(settings, self.tracker.clone(), self.paths.clone());
        let new = phases::resolve(&context, ticket).await;
        self.tracker.update(|status| *status = before);
        let new = new.inspect_err(|error| self.show_failure(error))?;
        if new.digest != old.digest {
            info!("{} stands for another image by now: {}", new.requested, new.pinned);
            self.tracker.restart(state::shown(&context.settings));
            record.step = Step::Idle;
        }
        Ok(())
    }

    /// Returns the changes that the switch would make; pulls and stages first if that was not done yet, which leaves the
    /// running system untouched.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn plan(&self, ticket: &Ticket) -> Result<PlanDocument, Error> {
        self.stage_again(ticket).await?;
        let record = self.record.lock().await;
        Ok(match &record.step {
            Step::Staged(_) => PlanDocument::staged(SwitchPlan::load(&self.paths)?),
            Step::NothingToDo { reason, .. } => PlanDocument::without_plan("nothing-to-do", Some(reason.clone())),
            _ => PlanDocument::without_plan("switched", None),
        })
    }

    /// Stages, again if that was done: `/etc`, the mounts and free memory may be others by now.
    async fn stage_again(&self, ticket: &Ticket) -> Result<(), Error> {
        {
            let mut record = self.record.lock().await;
            if let Step::Staged(staged) = &record.step {
                record.step = Step::Pulled(staged.pulled.clone());
            }
        }
        self.advance(Goal::Staged, ticket).await
    }

    /// Returns the changes to `/etc` as a unified diff; pulls and stages first, like [`Agent::plan`].
    /// Files that are not world-readable are only named, unless `secrets`. Empty when nothing is to be done.
    ///
    /// # Errors
    /// As [`Agent::advance`]; refused after the switch.
    pub async fn diff_etc(&self, secrets: bool, ticket: &Ticket) -> Result<Vec<u8>, Error> {
        self.stage_again(ticket).await?;
        // Held until the end, so that no switch begins meanwhile.
        let record = self.record.lock().await;
        let staged = match &record.step {
            Step::Staged(staged) => staged.clone(),
            Step::NothingToDo { .. } => return Ok(Vec::new()),
            _ => {
                return Err(Error::refused(
                    "switched",
                    "already switched: /etc is merged; see the report of the switch",
                ));
            }
        };
        let paths = self.paths.clone();
        let diff = tokio::task::spawn_blocking(move || phases::diff_etc(&paths, &staged, secrets)).await;
        Ok(diff.map_err(anyhow::Error::from)??)
    }
}
