//! The D-Bus interface: a thin view of the agent.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use disk_deploy::{DeployError, Request};
use tokio_util::sync::CancellationToken;
use zbus::message::Header;
use zbus::names::ErrorName;
use zbus::{Message, interface};

use super::INTERFACE;
use super::announced::{Announced, LastErrorTuple, TimelineTuple};
use crate::agent::{Agent, CancelHandle, Error, Goal};
use crate::report::Outcome;
use node_store::ProgressSnapshot;

/// The object behind [`super::PATH`].
pub(super) struct Pivot {
    pub(super) agent: Arc<Agent>,
    /// Cancelled when the peer of a private connection disconnects, so that a call without a waiting caller does not act
    /// hours later. Never cancelled on the bus, where connections outlive callers.
    pub(super) gone: CancellationToken,
}

impl Pivot {
    fn announced(&self) -> Announced {
        Announced::from(&self.agent.tracker().status())
    }

    fn cancel_handle(&self, call: &'static str) -> CancelHandle {
        let handle = self.agent.cancel_handle(call);
        handle.end_with(&self.gone);
        handle
    }
}

/// The error of a method. Its name, `org.nodeimage.Pivot1.Error.` with the name of the outcome, is for programs; its
/// message is for people.
#[derive(Debug)]
pub(super) struct MethodError {
    outcome: Outcome,
    message: String,
}

impl From<Error> for MethodError {
    fn from(error: Error) -> Self {
        Self { outcome: error.outcome(), message: error.to_string() }
    }
}

impl zbus::DBusError for MethodError {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(&self.message,))
    }

    fn name(&self) -> ErrorName<'_> {
        let name = format!("{INTERFACE}.Error.{}", self.outcome.error_name());
        ErrorName::try_from(name).unwrap_or(ErrorName::from_static_str_unchecked("org.freedesktop.DBus.Error.Failed"))
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}

#[interface(interface = "org.nodeimage.Pivot1")]
impl Pivot {
    /// Resolves, pulls and stages; returns when staged. The running system is unchanged.
    async fn pull(&self) -> Result<(), MethodError> {
        Ok(self.agent.pull(&self.cancel_handle("pull")).await?)
    }

    /// Fetches the content of the node image that the pull left out; pulls and stages first if needed. Possible at any
    /// time, also after the pivot: the running system is unchanged. Returns a report in lines.
    async fn complete(&self) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.complete(&self.cancel_handle("complete")).await?)
    }

    /// Deploys the node image to the sysroot of a disk; completes the node store first if needed. The running system is
    /// unchanged. `imgref` is the image that updates of the disk follow; empty for the node image by digest. Returns a
    /// report in lines.
    async fn deploy(
        &self,
        sysroot: String,
        stateroot: String,
        kernel_args: Vec<String>,
        imgref: String,
    ) -> Result<Vec<String>, MethodError> {
        let imgref = (!imgref.is_empty()).then(|| imgref.parse()).transpose().map_err(DeployError::from);
        let request = Request { sysroot: sysroot.into(), stateroot, kernel_args, imgref: imgref.map_err(Error::from)? };
        Ok(self.agent.deploy(request, &self.cancel_handle("deploy")).await?)
    }

    /// Switches and refreshes; pulls and stages first if needed.
    async fn overlay(&self) -> Result<(), MethodError> {
        Ok(self.agent.advance(Goal::Switched, &self.cancel_handle("overlay")).await?)
    }

    /// Isolates to the original default target; runs the earlier phases first if needed.
    async fn finish(&self) -> Result<(), MethodError> {
        Ok(self.agent.advance(Goal::Finished, &self.cancel_handle("finish")).await?)
    }

    /// Runs all phases of the flow.
    async fn run(&self) -> Result<(), MethodError> {
        Ok(self.agent.run(&self.cancel_handle("run")).await?)
    }

    /// Runs all phases of the flow with a trial period: the switch is undone this many seconds after it began, unless Keep
    /// is called.
    #[zbus(name = "Try")]
    async fn try_for(&self, seconds: u64) -> Result<(), MethodError> {
        Ok(self.agent.run_for(Duration::from_secs(seconds), &self.cancel_handle("run --try")).await?)
    }

    /// Ends the trial period: the switch stays. Returns one line.
    async fn keep(&self) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.keep().await?)
    }

    /// Restores `/usr` and `/etc`; returns the entries that the undo kept deliberately.
    async fn undo(&self) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.undo().await?)
    }

    /// Returns the changes that the switch would make, one per line.
    async fn plan(&self) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.plan(&self.cancel_handle("plan")).await?.lines())
    }

    /// Returns the changes that the switch would make, as a JSON document.
    async fn plan_document(&self) -> Result<String, MethodError> {
        let plan = self.agent.plan(&self.cancel_handle("plan")).await?;
        serde_json::to_string_pretty(&plan)
            .map_err(|error| MethodError { outcome: Outcome::Internal, message: error.to_string() })
    }

    /// Returns the changes that the switch would make in `/etc`, as a unified diff. The content of files that are not
    /// world-readable is included only if `secrets`.
    async fn diff_etc(&self, secrets: bool) -> Result<Vec<u8>, MethodError> {
        Ok(self.agent.diff_etc(secrets, &self.cancel_handle("diff-etc")).await?)
    }

    /// Cancels every call that has not begun to switch; returns one line if there was one.
    fn cancel(&self) -> Vec<String> {
        if self.agent.cancel() { vec!["cancelled".to_owned()] } else { Vec::new() }
    }

    /// Returns the report, as a JSON document: the status document and the timeline. All users may call it.
    fn report(&self) -> String {
        serde_json::to_string(&self.agent.report()).unwrap_or_default()
    }

    /// The whole status document, as JSON.
    #[zbus(property(emits_changed_signal = "false"))]
    fn status(&self) -> String {
        serde_json::to_string(&self.agent.status()).unwrap_or_default()
    }

    /// `idle`, `running`, `waiting`, `pulled`, `switched`, `done`, `failed`, `nothing-to-do`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.announced().state
    }

    /// The phase that runs or has failed; empty before the first.
    #[zbus(property)]
    fn phase(&self) -> String {
        self.announced().phase
    }

    /// Time at which the switch is undone unless Keep is called, in seconds since the epoch; 0 for never.
    #[zbus(property)]
    fn undo_at(&self) -> u64 {
        self.announced().undo_at
    }

    /// Counters of the pull, by name.
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress(&self) -> HashMap<String, u64> {
        counters(&self.agent.tracker().status().progress)
    }

    /// The last failure; all fields are empty if there is none.
    #[zbus(property)]
    fn last_error(&self) -> LastErrorTuple {
        self.announced().last_error
    }

    /// Phases so far: name, start in milliseconds since the epoch, duration in milliseconds (0
    /// while it runs).
    #[zbus(property)]
    fn timeline(&self) -> Vec<TimelineTuple> {
        self.announced().timeline
    }
}

fn counters(progress: &ProgressSnapshot) -> HashMap<String, u64> {
    match serde_json::to_value(progress) {
        Ok(serde_json::Value::Object(map)) => {
            map.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect()
        }
        _ => HashMap::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_in_the_property() {
        let progress = ProgressSnapshot { bytes_total: 7, ..Default::default() };
        let document = serde_json::to_value(progress).unwrap();
        assert_eq!(counters(&progress).get("bytes_total"), Some(&7));
        assert_eq!(counters(&progress).len(), document.as_object().unwrap().len());
    }
}
