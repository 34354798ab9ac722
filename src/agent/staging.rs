//! Calls that end before the switch: pull, plan and diff-etc.

use tracing::info;

use super::state::{self, Asked};
use super::{Agent, CancelHandle, Error, Goal, PlanDocument, Step, phases};
use crate::config::Settings;
use crate::report::RefusalId;

impl Agent {
    /// Resolves, pulls and stages. Reuses the result of an earlier call as long as the pull spec names the same image; a tag
    /// is resolved at each call.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn pull(&self, cancel: &CancelHandle) -> Result<(), Error> {
        self.resolve_again(cancel).await?;
        self.advance(Goal::Staged, cancel).await
    }

    /// Resets the step if a tag now names another image. A failure changes nothing.
    async fn resolve_again(&self, cancel: &CancelHandle) -> Result<(), Error> {
        let mut record = self.lock_for_phases(cancel).await?;
        let (Step::Pulled(_) | Step::Staged(_), Some(old)) = (&record.step, record.step.image().cloned()) else {
            return Ok(());
        };
        // The call that follows handles an invalid or changed configuration.
        let Ok(settings) = Settings::load() else { return Ok(()) };
        let asked = Asked::by(&settings);
        if record.asked.as_ref() != Some(&asked)
            || settings.image.as_ref().is_some_and(|image| image.spec().digest().is_some())
        {
            return Ok(());
        }
        let before = self.tracker.status();
        let new = phases::resolve(&self.tracker, &self.paths, &settings, cancel).await;
        self.tracker.update(|status| *status = before);
        let new = new.inspect_err(|error| self.show_failure(error))?;
        if new.digest != old.digest {
            info!("{} now names another image: {}", new.requested, new.pinned);
            self.tracker.restart(state::shown(&settings));
            record.step = Step::Idle;
        }
        Ok(())
    }

    /// Returns the changes that the switch would make; pulls and stages first if needed. The running system is unchanged.
    ///
    /// # Errors
    /// As [`Agent::advance`].
    pub async fn plan(&self, cancel: &CancelHandle) -> Result<PlanDocument, Error> {
        self.stage_again(cancel).await?;
        let record = self.record.lock().await;
        Ok(match &record.step {
            Step::Staged(staged) => PlanDocument::staged(staged.load(&self.paths)?),
            Step::NothingToDo { reason, .. } => PlanDocument::without_plan("nothing-to-do", Some(reason.clone())),
            _ => PlanDocument::without_plan("switched", None),
        })
    }

    /// Stages, also if that was done before, because `/etc`, the mounts or free memory may have changed.
    async fn stage_again(&self, cancel: &CancelHandle) -> Result<(), Error> {
        {
            let mut record = self.record.lock().await;
            if let Step::Staged(staged) = &record.step {
                record.step = Step::Pulled(staged.pulled.clone());
            }
        }
        self.advance(Goal::Staged, cancel).await
    }

    /// Returns the changes to `/etc` as a unified diff; pulls and stages first, like [`Agent::plan`].
    /// Files that are not world-readable are only named, unless `secrets`. Empty if there is nothing to do.
    ///
    /// # Errors
    /// As [`Agent::advance`]; refused after the switch.
    pub async fn diff_etc(&self, secrets: bool, cancel: &CancelHandle) -> Result<Vec<u8>, Error> {
        self.stage_again(cancel).await?;
        // Locked until the end, so that no switch begins meanwhile.
        let record = self.record.lock().await;
        let staged = match &record.step {
            Step::Staged(staged) => staged.clone(),
            Step::NothingToDo { .. } => return Ok(Vec::new()),
            _ => {
                return Err(Error::refused(
                    RefusalId::Switched,
                    "already switched: /etc is merged; see the report of the switch",
                ));
            }
        };
        let paths = self.paths.clone();
        let diff = tokio::task::spawn_blocking(move || phases::diff_etc(&paths, &staged, secrets)).await;
        diff.map_err(anyhow::Error::from)?
    }
}
