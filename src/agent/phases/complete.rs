//! Completing the node store, at any time after staging: what a deployment to a disk needs.

use std::time::Duration;

use tracing::{info, warn};

use super::pull;
use crate::agent::{Agent, Context, Error, Goal, Step, Ticket};
use crate::config::Settings;
use node_store::import::PulledImage;
use support::human_bytes;

impl Agent {
    /// Fetches what the pull left out of the node image (what only `/usr/lib/modules` has), so that the node
    /// store and the booted repo together hold all of its commit. Pulls and stages first if needed. The running
    /// system is untouched, also after the pivot, and where the pivot stands stays as it is: a failure here is the
    /// call's, not the pivot's. Answers with lines for a person.
    ///
    /// # Errors
    /// As [`Agent::advance`]. What was stored stays, and the next call goes on there.
    pub async fn complete(&self, ticket: &Ticket) -> Result<Vec<String>, Error> {
        let (pulled, download) = loop {
            let mut record = self.lock(ticket).await?;
            match &record.step {
                Step::Idle | Step::Resolved(_) | Step::Pulled(_) => {
                    drop(record);
                    self.advance(Goal::Staged, ticket).await?;
                }
                Step::NothingToDo { reason, .. } => return Ok(vec![format!("nothing to do: {reason}")]),
                _ => {
                    let Some(pulled) = pulled(&mut record.step).cloned() else {
                        return Err(Error::refused("half-done", "the switch is half done: finish or undo it first"));
                    };
                    if pulled.complete {
                        return Ok(vec![format!("the node store has all of {}", shown(&pulled))]);
                    }
                    if let Ok(download) = self.download.try_lock() {
                        break (pulled, download);
                    }
                    drop(record);
                    tokio::select! {
                        _ = self.download.lock() => {}
                        () = ticket.cancelled() => return Err(Error::cancelled()),
                    }
                }
            }
        };
        let settings = Settings::load().map_err(|error| Error::refused("configuration", format!("{error:#}")))?;
        // The record is not held: an undo, `keep` and the end of a trial period do not wait for a registry.
        let beside = self.tracker.beside();
        let context = Context::new(settings, beside.tracker().clone(), self.paths.clone());
        let download_ticket = self.download_tickets.draw("complete");
        download_ticket.end_with(ticket.token());
        let outcome = pull::rest(&context, &pulled, &download_ticket).await;
        drop((beside, download));
        let rest = outcome.inspect_err(|error| warn!("the node store is not complete: {error}"))?;
        let line = format!(
            "the node store has all of {}: {} objects more, {} fetched",
            shown(&pulled),
            rest.objects_written,
            human_bytes(rest.bytes_fetched)
        );
        info!("{line}");
        let mut record = self.record.lock().await;
        if let Some(now) = self::pulled(&mut record.step).filter(|now| now.commit == pulled.commit) {
            now.complete = true;
            self.tracker.update(|status| status.cost.bytes_fetched += rest.bytes_fetched);
            self.tracker.note(line.clone());
            self.save(&mut record)?;
        }
        Ok(vec![line])
    }

    /// Ends a download beside the pivot, so that nothing is written to the store during an undo. One that does not end
    /// in time writes objects only, which an undo leaves in place.
    pub(in crate::agent) async fn end_download(&self) {
        const LIMIT: Duration = Duration::from_secs(10);
        self.download_tickets.cancel_all();
        if tokio::time::timeout(LIMIT, self.download.lock()).await.is_err() {
            warn!("a download does not end; the undo begins without waiting any longer");
        }
    }
}

fn shown(pulled: &PulledImage) -> String {
    format!("{} (commit {})", pulled.image.pinned, pulled.commit)
}

/// The pulled image, at steps that do not depend on its being incomplete.
fn pulled(step: &mut Step) -> Option<&mut PulledImage> {
    match step {
        Step::Staged(staged) => Some(&mut staged.pulled),
        Step::Switched(switched) | Step::Refreshed(switched) | Step::Finished(switched) => {
            Some(&mut switched.staged.pulled)
        }
        _ => None,
    }
}
