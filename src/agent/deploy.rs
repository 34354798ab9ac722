//! Deploys the node image to a disk.

use std::fmt::Display;
use std::path::Path;

use disk_deploy::{DeployError, Deployed, Request};
use ostree::gio;
use ostree::prelude::CancellableExt;
use tracing::{info, warn};

use super::hooks::Hooks;
use super::phases::complete::staged;
use super::unit_survey::UnitSettings;
use super::{Agent, CancelHandle, Error, Record, StagedRoot, Step, storage};
use crate::config::Settings;
use crate::report::{Phase, RefusalId, Tracker};
use overlay_root::Namespace;
use support::human_bytes;

/// Percentage of the phase that ends with the last object. The rest is the sync, the deployment and the boot loader entries.
const OBJECTS: usize = 90;

impl Agent {
    /// Writes the node image from the node store to the ostree sysroot of a disk, as the deployment that it boots next.
    /// First pulls, stages and completes the node store if needed. The running system is unchanged. If the sysroot is its own,
    /// a switch waits for the deployment, and an undo is refused as busy. Returns a report in lines.
    ///
    /// # Errors
    /// As [`Agent::complete`]; refused if the disk cannot get the deployment, or if it is the running system's and a trial
    /// period runs.
    pub async fn deploy(&self, request: Request, cancel: &CancelHandle) -> Result<Vec<String>, Error> {
        let is_own = disk_deploy::is_running_system(&request.sysroot);
        refuse_on_trial(&*self.lock(cancel).await?, is_own)?;
        self.complete(cancel).await?;
        let mut record = self.lock(cancel).await?;
        refuse_on_trial(&record, is_own)?;
        if let Step::NothingToDo { reason, .. } = &record.step {
            return Err(Error::refused(RefusalId::NoNodeImage, format!("cannot deploy a node image: {reason}")));
        }
        let lost = "cannot deploy: another call has discarded the node image or is switching; nothing was written; run deploy \
                    again";
        let staged = staged(&mut record.step).cloned();
        let (staged, flow) = (staged.ok_or_else(|| Error::refused(RefusalId::NoNodeImage, lost))?, record.flow());
        // The deployment to the own sysroot gets a copy of /etc, which no switch or undo may change meanwhile.
        let _held = is_own.then_some(record);
        let settings =
            Settings::load().map_err(|error| Error::refused(RefusalId::Configuration, format!("{error:#}")))?;
        let target = UnitSettings::of(&settings, &self.tracker).target;
        let beside = self.tracker.beside(Phase::Deploy);
        let tracker = beside.tracker();
        let hooks = Hooks {
            tracker,
            dir: &self.paths,
            timeout: settings.hooks_timeout,
            target: &target,
            staged: &staged,
            flow,
            sysroot: Some(&request.sysroot),
        };
        tracker.begin(Phase::Deploy);
        let outcome = async {
            hooks.pre_deploy(cancel).await?;
            let deployed = self.write(&staged, request.clone(), tracker.clone(), cancel).await?;
            Ok::<_, Error>((deployed, hooks.post_deploy(cancel).await))
        }
        .await;
        beside.end(outcome.as_ref().err().map(|error| error as &dyn Display));
        let (deployed, failures) = outcome?;
        failures.iter().for_each(|failure| warn!("{failure}"));
        let line = report(&deployed, &request);
        info!("{line}");
        Ok([line].into_iter().chain(failures).collect())
    }

    /// Writes the objects and the deployment, until the call is cancelled.
    async fn write(
        &self,
        staged: &StagedRoot,
        request: Request,
        tracker: Tracker,
        cancel: &CancelHandle,
    ) -> Result<Deployed, Error> {
        let (paths, staged) = (self.paths.clone(), staged.clone());
        let cancellable = gio::Cancellable::new();
        let token = cancellable.clone();
        let mut writing = tokio::task::spawn_blocking(move || {
            let store = storage::of(&paths, &staged.delta)?;
            let progress = |percent| tracker.share(0, percent * OBJECTS / 100, 100);
            write(request, |request| disk_deploy::deploy(&store, &staged.pulled.image, request, &progress, &token))
        });
        let outcome = tokio::select! {
            outcome = &mut writing => outcome,
            () = cancel.cancelled() => {
                cancellable.cancel();
                writing.await
            }
        };
        outcome.map_err(anyhow::Error::from)?
    }
}

/// Refuses a deployment to the running system during a trial period, whose undo would not change the next boot.
fn refuse_on_trial(record: &Record, is_own: bool) -> Result<(), Error> {
    match is_own && record.trial.is_some_and(|trial| !trial.kept) {
        true => Err(Error::refused(
            RefusalId::OnTrial,
            "cannot deploy to the running system: the switch is in its trial period; run keep or undo first",
        )),
        false => Ok(()),
    }
}

/// Calls `deploy`. If the sysroot is that of the running system, it is writable for this call only.
fn write(
    mut request: Request,
    deploy: impl FnOnce(&Request) -> Result<Deployed, DeployError> + Send,
) -> Result<Deployed, Error> {
    if !disk_deploy::is_running_system(&request.sysroot) {
        return Ok(deploy(&request)?);
    }
    request.sysroot = "/".into();
    let (init, places) = (Namespace::init(), ["/sysroot", "/boot"].map(Path::new));
    request.must_seal = overlay_root::requires_verity(&init.mounts()?, Path::new("/"));
    disk_deploy::start_watcher();
    Ok(overlay_root::with_writable(&init, &places, || Ok(deploy(&request)))??)
}

fn report(deployed: &Deployed, request: &Request) -> String {
    let place = format!("{} in the stateroot {}", request.sysroot.display(), request.stateroot);
    match deployed.existed {
        true => format!("nothing to do: {place} boots commit {} next", deployed.commit),
        false => format!(
            "{place} boots commit {} next: wrote {} objects, about {}",
            deployed.commit,
            deployed.objects,
            human_bytes(deployed.bytes)
        ),
    }
}

impl From<DeployError> for Error {
    fn from(error: DeployError) -> Self {
        let id = match &error {
            DeployError::NoSysroot { .. } | DeployError::NoBoot { .. } => RefusalId::NoSysroot,
            DeployError::Booted(_) => RefusalId::BootedSysroot,
            DeployError::NoStateroot { .. } => RefusalId::NoStateroot,
            DeployError::Mode(_) | DeployError::Sealed { .. } => RefusalId::RepoMode,
            DeployError::Incomplete(_) => RefusalId::Incomplete,
            DeployError::KernelArg(_) => RefusalId::KernelArgument,
            DeployError::Reference(_) => RefusalId::ImageReference,
            DeployError::TooLittle { .. } | DeployError::TooFewInodes { .. } => RefusalId::TooLittle,
            DeployError::Cancelled => return Self::cancelled(),
            DeployError::Failed { .. } => return anyhow::Error::from(error).into(),
        };
        Self::refused(id, error.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::super::TrialPeriod;
    use super::*;

    #[test]
    fn a_trial_period_refuses_a_deployment_to_the_running_system_only() {
        let running = TrialPeriod::begin(Duration::from_secs(600));
        let over = TrialPeriod::begin(Duration::ZERO);
        let kept = TrialPeriod { kept: true, ..running };
        for (trial, is_own, is_refused) in [
            (None, true, false),
            (Some(running), true, true),
            (Some(over), true, true),
            (Some(kept), true, false),
            (Some(running), false, false),
        ] {
            let outcome = refuse_on_trial(&Record::default().with(trial), is_own);
            assert_eq!(outcome.is_err(), is_refused, "{trial:?} {is_own}");
        }
    }
}
