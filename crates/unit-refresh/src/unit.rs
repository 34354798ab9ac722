//! The facts about one active unit that the plan depends on.

use super::action::SocketOf;
use super::difference::Difference;
use super::policy::Wish;

/// An active unit, with all facts that the plan depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitState {
    /// Name of the unit, for example `sshd.service`.
    pub name: String,
    /// Files that its processes execute or map and that differ in the other tree, relative to `/usr`. Empty if it runs
    /// only current code.
    pub changed: Vec<String>,
    /// Difference of its definition.
    pub difference: Difference,
    /// Action that its unit file in the other tree requests.
    pub wish: Option<Wish>,
    /// Job that its unit file in the other tree refuses, by `RefuseManualStop=` or `RefuseManualStart=`.
    pub refuses: Option<Refusal>,
    /// Active units that systemd stops and restarts with it: the units that require it, are bound to it or are part of it,
    /// and their dependents.
    pub dependents: Vec<String>,
    /// Facts that only units of its type have.
    pub kind: Kind,
}

/// The type of a unit, with the facts that only units of this type have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Kind {
    /// A service.
    Service(Service),
    /// An active socket.
    Socket {
        /// Messages that it receives.
        listens: Listens,
        /// The active service that it started, if any.
        serves: Option<SocketOf>,
    },
    /// A new socket of the node image whose service is already active. systemd does not start a socket while its service
    /// runs.
    AddedSocket {
        /// Messages that its service receives now.
        listens: Listens,
        /// The active service.
        serves: SocketOf,
    },
    /// A mount, which has no processes.
    Mount,
    /// A timer or a path.
    #[default]
    Trigger,
}

/// Facts about a service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// The role of its processes.
    pub role: Role,
    /// The possibility to reload it, by its unit file in the other tree.
    pub reload: Reload,
    /// The active socket that starts it at the next connection. `None` if a unit other than its sockets wants it.
    pub left_to: Option<String>,
}

/// The role of a service's processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// They run until the service is stopped.
    #[default]
    Daemon,
    /// They run once (`Type=oneshot`).
    Oneshot,
    /// They serve one connection of a socket.
    Connection,
    /// They are a logind whose systemd, and with it the PAM module, has another release in the other tree.
    OutdatedLogind,
}

/// The possibility to reload a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reload {
    /// It has no `ExecReload=`.
    #[default]
    Unsupported,
    /// It has `ExecReload=` or `Type=notify-reload`.
    Supported,
}

/// The messages that a socket receives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Listens {
    /// No netlink messages.
    #[default]
    Others,
    /// The kernel's netlink messages, also if another socket of its service receives them. They are lost while no process
    /// listens.
    Netlink,
}

/// A job that systemd accepts only as the dependency of another job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `RefuseManualStop=` refuses stops and restarts.
    Stop,
    /// `RefuseManualStart=` refuses starts and restarts.
    Start,
}

impl UnitState {
    /// Returns the active service of a socket.
    pub(super) fn serves(&self) -> Option<&SocketOf> {
        match &self.kind {
            Kind::Socket { serves, .. } => serves.as_ref(),
            Kind::AddedSocket { serves, .. } => Some(serves),
            Kind::Service(_) | Kind::Mount | Kind::Trigger => None,
        }
    }

    /// Returns the facts about a service; for other units, those of a daemon without sockets.
    pub(super) fn service(&self) -> Service {
        if let Kind::Service(service) = &self.kind { service.clone() } else { Service::default() }
    }
}
