//! The D-Bus interface: a thin view of the agent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use disk_deploy::{DeployError, Request};
use tokio_util::sync::CancellationToken;
use zbus::message::Header;
use zbus::names::ErrorName;
use zbus::{Connection, Message, interface};

use super::announced::{Announced, LastErrorTuple, TimelineTuple};
use super::{INTERFACE, caller};
use crate::agent::{Agent, CancelHandle, Error, Goal};
use crate::report::Outcome;

/// The object behind [`super::PATH`].
pub(super) struct Pivot {
    pub(super) agent: Arc<Agent>,
    /// Cancelled when the peer of a private connection disconnects. Never cancelled on the bus, where connections outlive
    /// callers.
    pub(super) gone: CancellationToken,
}

/// The header of a call, and the connection that it came from.
type Caller<'a> = (Header<'a>, &'a Connection);

impl Pivot {
    fn announced(&self) -> Announced {
        Announced::from(&self.agent.tracker().status())
    }

    /// Returns the handle of a call, which ends when its caller disconnects: a call without a waiting caller must not act
    /// hours later.
    fn handle(&self, call: &'static str, (message, connection): Caller<'_>) -> CancelHandle {
        let handle = self.agent.cancel_handle(call);
        match message.sender() {
            Some(sender) => handle.end_with(caller::left(connection.clone(), sender.to_owned())),
            // Only a bus names senders.
            None => handle.end_with(self.gone.clone().cancelled_owned()),
        }
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
    async fn pull(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), MethodError> {
        Ok(self.agent.pull(&self.handle("pull", (header, connection))).await?)
    }

    /// Fetches the content of the node image that the pull left out; pulls and stages first if needed. Possible at any
    /// time, also after the pivot: the running system is unchanged. Returns a report in lines.
    async fn complete(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.complete(&self.handle("complete", (header, connection))).await?)
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
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<String>, MethodError> {
        let imgref = (!imgref.is_empty()).then(|| imgref.parse()).transpose().map_err(DeployError::from);
        let imgref = imgref.map_err(Error::from)?;
        let request = Request { sysroot: sysroot.into(), stateroot, kernel_args, imgref, ..Request::default() };
        Ok(self.agent.deploy(request, &self.handle("deploy", (header, connection))).await?)
    }

    /// Switches and refreshes; pulls and stages first if needed.
    async fn overlay(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), MethodError> {
        Ok(self.agent.advance(Goal::Switched, &self.handle("overlay", (header, connection))).await?)
    }

    /// Isolates to the original default target; runs the earlier phases first if needed.
    async fn finish(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), MethodError> {
        Ok(self.agent.advance(Goal::Finished, &self.handle("finish", (header, connection))).await?)
    }

    /// Runs all phases of the flow.
    async fn run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), MethodError> {
        Ok(self.agent.run(&self.handle("run", (header, connection))).await?)
    }

    /// Runs all phases of the flow with a trial period: the switch is undone this many seconds after it began, unless Keep
    /// is called.
    #[zbus(name = "Try")]
    async fn try_for(
        &self,
        seconds: u64,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), MethodError> {
        Ok(self.agent.run_for(Duration::from_secs(seconds), &self.handle("run --try", (header, connection))).await?)
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
    async fn plan(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<String>, MethodError> {
        Ok(self.agent.plan(&self.handle("plan", (header, connection))).await?.lines())
    }

    /// Returns the changes that the switch would make, as a JSON document.
    async fn plan_document(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String, MethodError> {
        let plan = self.agent.plan(&self.handle("plan", (header, connection))).await?;
        serde_json::to_string_pretty(&plan)
            .map_err(|error| MethodError { outcome: Outcome::Internal, message: error.to_string() })
    }

    /// Returns the changes that the switch would make in `/etc`, as a unified diff. The content of files that are not
    /// world-readable is included only if `secrets`.
    async fn diff_etc(
        &self,
        secrets: bool,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<u8>, MethodError> {
        Ok(self.agent.diff_etc(secrets, &self.handle("diff-etc", (header, connection))).await?)
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

    /// Counters of the pull, by name, and `seconds_left` while its rate is known. Announced each second of a pull.
    #[zbus(property)]
    fn progress(&self) -> BTreeMap<String, u64> {
        self.announced().progress
    }

    /// The requested image and its digest; empty as long as they are unknown.
    #[zbus(property)]
    fn image(&self) -> (String, String) {
        self.announced().image
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use zbus::object_server::Interface as _;

    use super::*;
    use crate::agent::{Boot, StateDir};

    /// Returns a line for each method, `name in out`, and each property, `name type signal`.
    fn interface_of(xml: &str) -> Vec<String> {
        let value = |line: &str, name: &str| {
            let (_, after) = line.split_once(&format!(" {name}=\""))?;
            Some(after.split('"').next()?.to_owned())
        };
        let mut lines: Vec<[String; 3]> = Vec::new();
        for line in xml.lines().map(str::trim) {
            let name = value(line, "name").unwrap_or_default();
            if line.starts_with("<method") {
                lines.push([name, String::new(), String::new()]);
            } else if line.starts_with("<property") {
                lines.push([name, value(line, "type").unwrap(), "yes".to_owned()]);
            } else if let (true, Some(last)) = (line.starts_with("<arg"), lines.last_mut()) {
                let at = if value(line, "direction").as_deref() == Some("out") { 2 } else { 1 };
                last[at].push_str(&value(line, "type").unwrap());
            } else if line.contains("EmitsChangedSignal") && line.contains("\"false\"") {
                lines.last_mut().unwrap()[2] = "no".to_owned();
            }
        }
        lines.iter().map(|line| line.join(" ")).collect()
    }

    #[test]
    fn the_page_lists_the_interface() {
        let directory = tempfile::tempdir().unwrap();
        let agent = Agent::open(StateDir::below(directory.path()), Boot::Live).unwrap();
        let mut xml = String::new();
        Pivot { agent, gone: CancellationToken::new() }.introspect_to_writer(&mut xml, 0);
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/dbus.md")).unwrap();
        let rows = page.lines().filter_map(|line| {
            let cells: Vec<_> = line.strip_prefix("| `")?.split(" | ").map(|cell| cell.replace('`', "")).collect();
            (cells.len() >= 4).then(|| cells[..3].join(" ").replace('–', ""))
        });
        let (mut rows, mut interface): (Vec<_>, Vec<_>) = (rows.collect(), interface_of(&xml));
        rows.sort();
        interface.sort();
        assert!(interface.len() > 15, "{xml}");
        for (at, _) in xml.match_indices("<method ").chain(xml.match_indices("<property ")) {
            assert!(xml[..at].trim_end().ends_with("-->"), "a member without a description: {}", &xml[at..]);
        }
        assert_eq!(rows, interface, "docs/dbus.md, then the introspection");
    }
}
