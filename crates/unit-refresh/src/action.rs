//! The decision about one unit, in words and as systemd's jobs. Pure.

use serde::{Deserialize, Serialize};

use super::policy::KINDS;

/// What happens to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// It changed, and nothing has to be done about it.
    None,
    /// Told to read its configuration again, after the switch.
    Reload,
    /// Restarted after the switch.
    Restart,
    /// Left alone on purpose; it stays as the bootimage started it.
    Never,
    /// Stopped: it has no unit file any more. Before an undo: its unit file goes with the node image's `/usr`.
    Stop,
    /// Started: by the isolate what the node image newly wants, by an undo what the switch stopped.
    Start,
}

impl Class {
    /// The word in the journal and in the plan.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::None => "none",
            Class::Reload => "reload",
            Class::Restart => "restart",
            Class::Never => "never",
            Class::Stop => "stop",
            Class::Start => "start",
        }
    }
}

/// How services and sockets that belong together are restarted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// On its own.
    #[default]
    Alone,
    /// The service is stopped; its socket goes on listening and starts it with the next connection.
    LeftToSocket(String),
    /// The service is part of what happens to this socket.
    WithSocket(String),
    /// The socket's service is stopped first: a socket is not started while its service runs.
    SocketOf {
        /// The service.
        service: String,
        /// Its other active sockets: they would start it in between.
        #[serde(default)]
        others: Vec<String>,
        /// Whether it is started again at once, because more than the socket wants it.
        start: bool,
    },
}

/// The decision about one unit, with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// Which unit.
    pub unit: String,
    /// What happens to it.
    pub class: Class,
    /// Why.
    pub reason: String,
    /// In which way.
    #[serde(default, skip_serializing_if = "How::is_alone")]
    pub how: How,
    /// Active units that systemd stops and restarts with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub along: Vec<String>,
}

impl How {
    fn is_alone(&self) -> bool {
        *self == How::Alone
    }
}

/// A job of systemd's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Reload a unit that runs.
    Reload,
    /// Restart a unit that runs.
    TryRestart,
    /// Start.
    Start,
    /// Stop.
    Stop,
}

impl Action {
    /// One that concerns nothing else.
    pub fn new(unit: impl Into<String>, class: Class, reason: impl Into<String>) -> Self {
        Self { unit: unit.into(), class, reason: reason.into(), how: How::Alone, along: Vec::new() }
    }

    /// The jobs that carry it out, in order.
    pub fn jobs(&self) -> Vec<(Verb, &str)> {
        let unit = self.unit.as_str();
        match (self.class, &self.how) {
            (Class::None | Class::Never, _) | (_, How::WithSocket(_)) => Vec::new(),
            (Class::Restart | Class::Start, How::SocketOf { service, others, start }) => {
                // Sockets first: one that listens on would start the service again, and a socket is not started
                // while its service runs.
                let others = || others.iter().map(String::as_str);
                let own = Some(unit).filter(|_| self.class == Class::Restart);
                let stops = own.into_iter().chain(others()).chain([service.as_str()]);
                // Of what was stopped along, targets are no work to be done again.
                let along = self.along.iter().map(String::as_str);
                let along = along.filter(|name| *name != service && KINDS.iter().any(|kind| name.ends_with(kind)));
                let again = [service.as_str()].into_iter().filter(|_| *start || !self.along.is_empty());
                let starts = [unit].into_iter().chain(others()).chain(again).chain(along);
                stops.map(|name| (Verb::Stop, name)).chain(starts.map(|name| (Verb::Start, name))).collect()
            }
            // What else is to start is started by the isolate.
            (Class::Start, _) => Vec::new(),
            (Class::Reload, _) => vec![(Verb::Reload, unit)],
            (Class::Stop, _) | (Class::Restart, How::LeftToSocket(_)) => vec![(Verb::Stop, unit)],
            (Class::Restart, How::Alone) => vec![(Verb::TryRestart, unit)],
        }
    }
}
