//! Completing the node store, at any time after staging: what a deployment to a disk needs.

use tracing::{info, warn};

use super::{Agent, Context, Error, Goal, Step, Ticket, fetch};
use crate::config::Settings;
use crate::import::PulledImage;
use crate::report::human_bytes;

impl Agent {
    /// Fetches what the pull left out of the node image (what only `/usr/lib/modules` has), so that the node
    /// store and the booted repo together hold all of its commit. Pulls and stages first if needed. The running
    /// system is untouched, also after the pivot, and where the pivot stands stays as it is: a failure here is the
    /// call's, not the pivot's. Answers with lines for a person.
    ///
    /// # Errors
    /// As [`Agent::advance`]. What was stored stays, and the next call goes on there.
    pub async fn complete(&self, ticket: &Ticket) -> Result<Vec<String>, Error> {
        let mut record = loop {
            let record = tokio::select! {
                record = self.record.lock() => record,
                () = ticket.cancelled() => return Err(Error::Cancelled),
            };
            match &record.step {
                Step::Idle | Step::Resolved(_) | Step::Pulled(_) => {}
                Step::NothingToDo { reason, .. } => return Ok(vec![format!("nothing to do: {reason}")]),
                _ => break record,
            }
            drop(record);
            self.advance(Goal::Staged, ticket).await?;
        };
        let Some(pulled) = pulled(&mut record.step) else {
            return Err(Error::Refused("the switch is half done: finish or undo it first".into()));
        };
        let shown = format!("{} (commit {})", pulled.image.pinned, pulled.commit);
        if pulled.complete {
            return Ok(vec![format!("the node store has all of {shown}")]);
        }
        let settings = Settings::load().map_err(|error| Error::Refused(format!("{error:#}; nothing was changed")))?;
        let context = Context::new(settings, self.tracker.clone(), self.paths.clone());
        let before = self.tracker.status();
        let outcome = fetch::rest(&context, pulled, ticket).await;
        self.tracker.update(|status| *status = before);
        let rest = outcome.inspect_err(|error| warn!("the node store is not complete: {error}"))?;
        pulled.complete = true;
        let line = format!(
            "the node store has all of {shown}: {} objects more, {} fetched",
            rest.objects_written,
            human_bytes(rest.bytes_fetched)
        );
        info!("{line}");
        self.tracker.update(|status| status.cost.bytes_fetched += rest.bytes_fetched);
        self.tracker.note(line.clone());
        self.save(&mut record)?;
        Ok(vec![line])
    }
}

/// What was pulled, where all that could need it has been done or can wait.
fn pulled(step: &mut Step) -> Option<&mut PulledImage> {
    match step {
        Step::Staged(staged) => Some(&mut staged.pulled),
        Step::Switched(switched) | Step::Refreshed(switched) | Step::Finished(switched) => {
            Some(&mut switched.staged.pulled)
        }
        _ => None,
    }
}
