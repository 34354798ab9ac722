//! The decision about one unit, as text and as systemd jobs. Pure.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

use super::policy::KINDS;

/// The action for a unit; `docs/units.md` has the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Class {
    /// The unit changed, but needs no action.
    None,
    /// Reloaded after the switch.
    Reload,
    /// Restarted after the switch.
    Restart,
    /// Deliberately left running as the bootimage started it.
    Never,
    /// Stopped because its unit file is missing. Before an undo: because only the node image has its unit file.
    Stop,
    /// Started: by the isolate, because the node image newly wants it; or by an undo, because the switch stopped it.
    Start,
    /// Held back until the next boot, because the isolate would start it and it may end the boot.
    Hold,
}

impl Class {
    /// Returns the word that the journal and the plan use.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// The order of jobs for a service and its sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// The unit is restarted without others.
    #[default]
    Alone,
    /// The service is stopped. This socket keeps listening and starts it at the next connection.
    LeftToSocket(String),
    /// The jobs of this socket include the unit.
    WithSocket(String),
    /// The socket's service is stopped first, because systemd does not start a socket while its service runs.
    SocketOf(SocketOf),
}

/// The active service of a socket, and the units that stop and start with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOf {
    /// The service that the socket starts.
    pub service: String,
    /// The other active sockets of the service. They are stopped too, because they would start it in between.
    #[serde(default)]
    pub others: Vec<String>,
    /// True if the service is started again at once, because a unit other than its sockets wants it.
    pub start: bool,
}

/// The decision about one unit, with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// The name of the unit.
    pub unit: String,
    /// The action for the unit.
    pub class: Class,
    /// The cause of the action, for the journal and the plan.
    pub reason: String,
    /// The order of jobs, if the unit belongs to a socket.
    #[serde(default, skip_serializing_if = "How::is_alone")]
    pub how: How,
    /// Active units that systemd stops and restarts with the unit.
    #[serde(rename = "along", default, skip_serializing_if = "Vec::is_empty")]
    pub dependents: Vec<String>,
}

impl How {
    fn is_alone(&self) -> bool {
        *self == How::Alone
    }
}

/// The type of a systemd job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Verb {
    /// Reload an active unit.
    Reload,
    /// Restart an active unit.
    TryRestart,
    /// Start a unit.
    Start,
    /// Stop a unit.
    Stop,
}

impl Verb {
    /// Returns the command of systemctl.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Returns the method of PID 1 that queues the job.
    pub(super) fn method(self) -> &'static str {
        match self {
            Verb::Reload => "ReloadUnit",
            Verb::TryRestart => "TryRestartUnit",
            Verb::Start => "StartUnit",
            Verb::Stop => "StopUnit",
        }
    }
}

impl Action {
    /// Creates an action without related sockets or dependents.
    pub fn new(unit: impl Into<String>, class: Class, reason: impl Into<String>) -> Self {
        Self { unit: unit.into(), class, reason: reason.into(), how: How::Alone, dependents: Vec::new() }
    }

    /// Returns the jobs that carry out the action, in order.
    pub fn jobs(&self) -> Vec<(Verb, &str)> {
        let unit = self.unit.as_str();
        match (self.class, &self.how) {
            (Class::None | Class::Never | Class::Hold, _) | (_, How::WithSocket(_)) => Vec::new(),
            (Class::Restart | Class::Start, How::SocketOf(SocketOf { service, others, start })) => {
                // Sockets are stopped first: a listening socket would start the service again. They are also
                // started first: systemd does not start a socket while its service runs.
                let others = || others.iter().map(String::as_str);
                let own = Some(unit).filter(|_| self.class == Class::Restart);
                let stops = own.into_iter().chain(others()).chain([service.as_str()]);
                // Targets that were stopped as dependents are not started again: they have no processes.
                let dependents = self.dependents.iter().map(String::as_str);
                let dependents =
                    dependents.filter(|name| *name != service && KINDS.iter().any(|kind| name.ends_with(kind)));
                let again = [service.as_str()].into_iter().filter(|_| *start || !self.dependents.is_empty());
                let starts = [unit].into_iter().chain(others()).chain(again).chain(dependents);
                stops.map(|name| (Verb::Stop, name)).chain(starts.map(|name| (Verb::Start, name))).collect()
            }
            // The isolate starts all other units.
            (Class::Start, _) => Vec::new(),
            (Class::Reload, _) => vec![(Verb::Reload, unit)],
            (Class::Stop, _) | (Class::Restart, How::LeftToSocket(_)) => vec![(Verb::Stop, unit)],
            (Class::Restart, How::Alone) => vec![(Verb::TryRestart, unit)],
        }
    }
}
