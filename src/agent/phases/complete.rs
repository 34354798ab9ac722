//! Completes the node store after staging, which a deployment to a disk requires.

use std::fmt::Display;
use std::time::Duration;

use tracing::{info, warn};

use super::pull::{self, Target};
use crate::agent::{Agent, CancelHandle, Error, Extent, Finished, StagedRoot, Step, Switched, storage};
use crate::config::Settings;
use crate::report::{Phase, RefusalId};
use node_store::import::{PulledImage, has_image};
use support::human_bytes;

impl Agent {
    /// Fetches the content that the pull left out (objects that only `/usr/lib/modules` uses), so that the node store and
    /// the booted repo together hold the whole commit. If nothing was pulled yet, pulls all content at once and stages.
    /// Changes neither the running system nor the step of the pivot, also after the switch. Returns a report in lines.
    ///
    /// # Errors
    /// As [`Agent::advance`]. Stored objects stay, and the next call continues with the missing ones.
    pub async fn complete(&self, cancel: &CancelHandle) -> Result<Vec<String>, Error> {
        let (pulled, download) = loop {
            let mut record = self.lock(cancel).await?;
            match &record.step {
                Step::Idle | Step::Resolved(_) | Step::Pulled(_) => {
                    drop(record);
                    self.advance_by(Extent::Complete, cancel).await?;
                }
                Step::NothingToDo { reason, .. } => return Ok(vec![format!("nothing to do: {reason}")]),
                _ => {
                    let Some(staged) = staged(&mut record.step) else {
                        return Err(Error::refused(
                            RefusalId::HalfDone,
                            "the switch is half done: finish or undo it first",
                        ));
                    };
                    if self.is_complete(staged).await? {
                        return Ok(vec![format!("the node store has all of {}", shown(&staged.pulled))]);
                    }
                    if let Ok(download) = self.download.try_lock() {
                        break (staged.pulled.clone(), download);
                    }
                    drop(record);
                    tokio::select! {
                        _ = self.download.lock() => {}
                        () = cancel.cancelled() => return Err(Error::cancelled()),
                    }
                }
            }
        };
        let settings =
            Settings::load().map_err(|error| Error::refused(RefusalId::Configuration, format!("{error:#}")))?;
        // The record is not locked, so undo, `keep` and the end of a trial period do not wait for a registry.
        let beside = self.tracker.beside(Phase::Pull);
        let Settings { registry, store, .. } = &settings;
        let target = Target { tracker: beside.tracker(), dir: &self.paths, registry, store: *store };
        let download_handle = self.download_cancel.register("complete");
        download_handle.end_with(cancel.token().clone().cancelled_owned());
        let outcome = pull::rest(&target, &pulled, &download_handle).await;
        beside.end(outcome.as_ref().err().map(|error| error as &dyn Display));
        drop(download);
        let rest = outcome.inspect_err(|error| warn!("the node store is not complete: {error}"))?;
        let line = format!(
            "the node store has all of {}: {} objects more, {} fetched",
            shown(&pulled),
            rest.objects_written,
            human_bytes(rest.bytes_fetched)
        );
        info!("{line}");
        let mut record = self.record.lock().await;
        if let Some(now) = staged(&mut record.step).filter(|now| now.pulled.commit == pulled.commit) {
            now.pulled.complete = true;
            self.tracker.update(|status| status.cost.bytes_fetched += rest.bytes_fetched);
            self.tracker.note(line.clone());
            self.save(&mut record)?;
        }
        Ok(vec![line])
    }

    async fn is_complete(&self, StagedRoot { pulled, delta, .. }: &StagedRoot) -> anyhow::Result<bool> {
        if !pulled.complete {
            return Ok(false);
        }
        let (store, image) = (storage::of(&self.paths, delta)?, pulled.image.clone());
        Ok(tokio::task::spawn_blocking(move || has_image(&store, &image)).await??)
    }

    /// Cancels a download beside the pivot, so that it does not write to the store during an undo. A download that does not
    /// end within 10 s writes only objects, which an undo keeps.
    pub(in crate::agent) async fn end_download(&self) {
        const LIMIT: Duration = Duration::from_secs(10);
        self.download_cancel.cancel_all();
        if tokio::time::timeout(LIMIT, self.download.lock()).await.is_err() {
            warn!("a download did not end within 10 s; starting the undo");
        }
    }
}

fn shown(pulled: &PulledImage) -> String {
    format!("{} (commit {})", pulled.image.pinned, pulled.commit)
}

/// Returns the staged tree at the steps at which its image may be completed.
pub(in crate::agent) fn staged(step: &mut Step) -> Option<&mut StagedRoot> {
    match step {
        Step::Staged(staged) | Step::Switched(Switched { staged }) => Some(staged),
        Step::Refreshed(refreshed) | Step::Finished(Finished(refreshed)) => Some(&mut refreshed.staged),
        _ => None,
    }
}
