//! Deploys the node image to a disk.

use std::path::PathBuf;

use disk_deploy::{DeployError, Deployed, Request};
use ostree::gio;
use ostree::prelude::CancellableExt;
use tracing::info;

use super::phases::complete::staged;
use super::{Agent, CancelHandle, Error, Step, storage};
use crate::report::RefusalId;
use overlay_root::Namespace;
use support::human_bytes;

impl Agent {
    /// Writes the node image from the node store to the ostree sysroot of a disk, as the deployment that it boots next.
    /// First pulls, stages and completes the node store if needed. The running system is unchanged. Returns a report in
    /// lines.
    ///
    /// # Errors
    /// As [`Agent::complete`]; refused if the disk cannot get the deployment.
    pub async fn deploy(&self, request: Request, cancel: &CancelHandle) -> Result<Vec<String>, Error> {
        self.complete(cancel).await?;
        let staged = {
            let mut record = self.record.lock().await;
            if let Step::NothingToDo { reason, .. } = &record.step {
                let message = format!("cannot deploy a node image: {reason}");
                return Err(Error::refused(RefusalId::NoNodeImage, message));
            }
            let lost = "cannot deploy: another call has discarded the node image or is switching; nothing was written; run \
                        deploy again";
            staged(&mut record.step).cloned().ok_or_else(|| Error::refused(RefusalId::NoNodeImage, lost))?
        };
        let (paths, asked) = (self.paths.clone(), request.clone());
        let cancellable = gio::Cancellable::new();
        let token = cancellable.clone();
        let mut writing = tokio::task::spawn_blocking(move || {
            let store = storage::of(&paths, &staged.delta)?;
            write(request, |request| disk_deploy::deploy(&store, &staged.pulled.image, request, &token))
        });
        let outcome = tokio::select! {
            outcome = &mut writing => outcome,
            () = cancel.cancelled() => {
                cancellable.cancel();
                writing.await
            }
        };
        let line = report(&outcome.map_err(anyhow::Error::from)??, &asked);
        info!("{line}");
        Ok(vec![line])
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
    let (init, places) = (Namespace::init(), ["/sysroot", "/boot"].map(PathBuf::from));
    let mounts = init.mounts()?;
    let places: Vec<_> = places.into_iter().filter(|place| overlay_root::top(&mounts, place).is_some()).collect();
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
            DeployError::Mode(_) => RefusalId::RepoMode,
            DeployError::Incomplete(_) => RefusalId::Incomplete,
            DeployError::KernelArg(_) => RefusalId::KernelArgument,
            DeployError::Reference(_) => RefusalId::ImageReference,
            DeployError::TooLittle { .. } => RefusalId::TooLittle,
            DeployError::Cancelled => return Self::cancelled(),
            DeployError::Failed { .. } => return anyhow::Error::from(error).into(),
        };
        Self::refused(id, error.to_string())
    }
}
