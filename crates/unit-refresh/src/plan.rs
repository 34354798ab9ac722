//! What to do about a unit that runs the bootimage's code, or that the node image defines otherwise: a total function of
//! plain data. `docs/units.md` has the rules.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::action::{Action, Class, How};
use super::difference::{Difference, KEY};
use super::policy::{KINDS, OWN, Policy, Wish};

/// In which of the flows the pivot runs: it bounds what may be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// In the pivot target, before the units of the default target: little runs, all of it may restart.
    Bootstrap,
    /// On a system that has long booted: nothing that runs may be stopped, except that new logins must
    /// work (sessions survive).
    Live,
}

/// An active unit, with what the plan depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitState {
    /// `sshd.service`.
    pub name: String,
    /// Files under `/usr`, relative to it, that its processes execute or map and that differ in the
    /// other tree. Empty when it runs nothing old.
    pub changed: Vec<String>,
    /// How its definition differs.
    pub difference: Difference,
    /// What its unit file in the other tree asks for.
    pub wish: Option<Wish>,
    /// A service that does its work and ends: nothing of it runs.
    pub oneshot: bool,
    /// A service that can be reloaded, by its unit file in the other tree.
    pub reloadable: bool,
    /// A service that serves one connection of a socket.
    pub connection: bool,
    /// A socket of the kernel's, or one whose service has such a socket: what is said while nobody listens is lost.
    pub netlink: bool,
    /// Of a service: the active sockets that start it.
    pub sockets: Vec<String>,
    /// Of a socket: the active service that it started.
    pub serves: Option<String>,
    /// Of a socket: the other active sockets of that service.
    pub others: Vec<String>,
    /// Whether something else than its sockets wants the service, or the one that the socket serves.
    pub wanted: bool,
    /// A socket that the node image newly has, of a service that runs already: systemd starts it only when the
    /// service does not run.
    pub arrives: bool,
    /// The key of its unit file in the other tree that lets nobody stop it by hand, such as `RefuseManualStop=`.
    pub refuses: Option<Refusal>,
    /// Active units that systemd stops and restarts with it: those that require it, are bound to it or part of it, and
    /// theirs.
    pub along: Vec<String>,
    /// Of logind: the other tree's systemd, and with it the PAM module, is of another release.
    pub other_release: bool,
}

/// Jobs that systemd takes only as the dependency of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `RefuseManualStop=`: neither a stop nor a restart.
    Stop,
    /// `RefuseManualStart=`: no restart.
    Start,
}

/// Units whose restart would take the system, a session or us down. Reported instead.
/// Sources: what systemd itself marks as not restartable, and what holds user sessions.
const NEVER: &[&str] = &[
    "dbus.service",
    "dbus-broker.service",
    "dbus.socket",
    LOGIND,
    // With their sockets: what is logged in between would be lost.
    "systemd-journald",
    "user@",
    "user-runtime-dir@",
    "getty@",
    "serial-getty@",
    "console-getty.service",
    "container-getty@",
    // Instances of a socket-activated sshd: each is a login that runs, the next one runs new code.
    "ssh@",
    "sshd@",
    "emergency.service",
    "rescue.service",
    // The way in when there is no other.
    "debug-shell.service",
];

/// Listed, too, but for one case: a logind of systemd 252 left alone would refuse every user manager whose PAM module is
/// of 256 or later, which asks for a class of session that it does not know. What the next one will ask for nobody
/// knows. So next to another release of systemd it is restarted; no session ends with it: it keeps them on record and their
/// devices with systemd (it is restarted at will since systemd 219).
pub(super) const LOGIND: &str = "systemd-logind.service";

/// The only units that the live flow restarts, because new logins need them. No session ends with either: sshd's
/// are processes of their own.
const LIVE: &[&str] = &["ssh.service", "sshd.service", LOGIND];

/// Decides for every unit that changed, in the order in which it is to be done: what is gone is stopped first, and
/// sockets come before services.
pub fn plan(units: &[UnitState], flow: Flow, policy: &Policy) -> Vec<Action> {
    let mut actions: Vec<_> = units.iter().filter_map(|unit| decide(unit, flow, policy)).collect();
    let planned: BTreeMap<String, Class> = actions.iter().map(|one| (one.unit.clone(), one.class)).collect();
    let states: BTreeMap<&str, &UnitState> = units.iter().map(|unit| (unit.name.as_str(), unit)).collect();
    for action in &mut actions {
        if let Some(unit) = states.get(action.unit.as_str()) {
            spare(action, unit, |name| must_stay(name, planned.get(name), flow, policy));
        }
    }
    pair(&mut actions);
    actions.sort_by_key(|action| match (action.class, action.unit.ends_with(".socket")) {
        (Class::Stop, _) => 0,
        (_, true) => 1,
        _ => 2,
    });
    actions
}

/// What the isolate to `target` starts that it would not have started without the node image: of what `arriving`, all that
/// the target newly pulls in, is not active.
pub fn starts(arriving: &BTreeSet<String>, active: &BTreeSet<String>, target: &str) -> Vec<Action> {
    let concerned = |name: &&String| KINDS.iter().any(|kind| name.ends_with(kind)) && !active.contains(*name);
    let reason = || format!("the node image has it wanted by {target}, which is isolated in the end");
    let start = |name: &String| Action::new(name, Class::Start, reason());
    arriving.iter().filter(concerned).map(start).collect()
}

/// The plan of an undo: that of [`plan`], except that units which only the node image has are stopped, in
/// both flows: what they run is about to go, and the bootimage's programs cannot stop them later.
pub fn undo_plan(units: &[UnitState], leaving: &[String], flow: Flow, policy: &Policy) -> Vec<Action> {
    let stop = |unit: &String| Action::new(unit, Class::Stop, "only the node image has its unit file");
    let stays = |action: &Action| !leaving.contains(&action.unit);
    leaving.iter().map(stop).chain(plan(units, flow, policy).into_iter().filter(stays)).collect()
}

/// Whether a unit may not be stopped along with another one, whether or not it changed itself.
fn must_stay(name: &str, planned: Option<&Class>, flow: Flow, policy: &Policy) -> bool {
    // A target has no processes; what would be stopped with it is asked about by its own name.
    if name.ends_with(".target") {
        return false;
    }
    match (planned, policy.of(name)) {
        (Some(class), _) if *class != Class::None => *class == Class::Never,
        (_, Some((_, wish))) => wish == Wish::Never,
        // A scope holds processes that systemd has not started and cannot start again; what is mounted is in use.
        _ => {
            let kind = [".scope", ".mount", ".swap"].iter().any(|kind| name.ends_with(kind));
            flow == Flow::Live || kind || is_listed(name) || name.starts_with(OWN)
        }
    }
}

/// Turns what systemd would refuse, or what would take a unit along that must stay, into leaving it alone.
fn spare(action: &mut Action, unit: &UnitState, must_stay: impl Fn(&str) -> bool) {
    if !matches!(action.class, Class::Stop | Class::Restart | Class::Start) {
        return;
    }
    let why = match (unit.along.iter().chain(&unit.others).find(|name| must_stay(name)), unit.refuses) {
        (Some(name), _) => format!("{name} would be stopped with it, and is to stay"),
        (None, Some(Refusal::Stop)) => "systemd stops it for no one by hand (RefuseManualStop=)".to_owned(),
        (None, Some(Refusal::Start)) if action.class != Class::Stop => {
            "systemd starts it for no one by hand (RefuseManualStart=)".to_owned()
        }
        (None, _) => {
            action.along.clone_from(&unit.along);
            return;
        }
    };
    *action = Action::new(&action.unit, Class::Never, format!("{}; {why}", action.reason));
}

/// A service whose socket is restarted is restarted with it; a socket whose service must stay stays.
fn pair(actions: &mut [Action]) {
    let class_of: BTreeMap<String, Class> = actions.iter().map(|action| (action.unit.clone(), action.class)).collect();
    let mut with: BTreeMap<String, String> = BTreeMap::new();
    for action in actions.iter_mut() {
        let How::SocketOf { service, start, .. } = &mut action.how else { continue };
        if class_of.get(service) == Some(&Class::Never) {
            let reason = format!("{}; {service}, which it starts, is not restarted", action.reason);
            *action = Action::new(&action.unit, Class::Never, reason);
        } else if let Some(first) = with.get(service).filter(|_| action.class == Class::Restart) {
            action.how = How::WithSocket(first.clone());
        } else {
            with.insert(service.clone(), action.unit.clone());
            if class_of.get(service) == Some(&Class::Stop) {
                *start = false;
                action.along.clear();
            }
        }
    }
    for action in actions.iter_mut().filter(|one| matches!(one.class, Class::Restart | Class::Reload)) {
        if let Some(socket) = with.get(&action.unit) {
            // A reload is no more asked for by then.
            action.class = Class::Restart;
            action.how = How::WithSocket(socket.clone());
        }
    }
}

/// What changed about it, in words; `None` when nothing did.
fn what_changed(unit: &UnitState) -> Option<String> {
    let rest = |more: usize| if more > 1 { format!(" and {} more", more - 1) } else { String::new() };
    let code = unit.changed.first().map(|first| format!("/usr/{first}{} changed", rest(unit.changed.len())));
    let definition = match &unit.difference {
        Difference::Same => None,
        Difference::Reload => Some("its ExecReload= changed".to_owned()),
        Difference::Changed(keys) => {
            keys.first().map(|first| format!("{first}{} changed in its unit", rest(keys.len())))
        }
        Difference::Gone => Some("its unit file is gone".to_owned()),
        Difference::Masked => Some("it is masked".to_owned()),
    };
    match (code, definition) {
        (Some(code), Some(definition)) => Some(format!("{definition}, {code}")),
        (code, definition) => definition.or(code),
    }
}

fn is_listed(name: &str) -> bool {
    NEVER.iter().any(|prefix| name.starts_with(prefix))
}

fn decide(unit: &UnitState, flow: Flow, policy: &Policy) -> Option<Action> {
    if unit.arrives {
        return arrive(unit, flow, policy);
    }
    let what = what_changed(unit)?;
    let name = unit.name.as_str();
    let act = |class, why: &str| {
        let reason = if why.is_empty() { what.clone() } else { format!("{what}; {why}") };
        Some(Action::new(name, class, reason))
    };
    if name.starts_with(OWN) {
        return act(Class::Never, "the agent's own units are never touched");
    }
    let leaves = matches!(unit.difference, Difference::Gone | Difference::Masked);
    let wished = |wish, whose: &str| match wish {
        Wish::Never => act(Class::Never, whose),
        Wish::Stop => act(Class::Stop, whose),
        // There is nothing that could be reloaded or started again.
        _ if leaves => None,
        Wish::Reload if unit.reloadable => act(Class::Reload, whose),
        Wish::Reload => act(Class::Never, &format!("{whose} a reload, and it has no ExecReload=")),
        Wish::Restart => restart(unit, act(Class::Restart, whose)),
    };
    let listed = is_listed(name) && !(name == LOGIND && unit.other_release);
    // A pattern may match more than whoever wrote it thought of.
    if let Some((pattern, wish)) = policy.of(name).filter(|(pattern, _)| !listed || *pattern == name)
        && let Some(action) = wished(wish, &format!("the configuration wants this for \"{pattern}\""))
    {
        return Some(action);
    }
    let spared = |service: &str| matches!(policy.of(service), Some((_, Wish::Never)));
    if unit.serves.as_deref().is_some_and(spared) {
        return act(Class::Never, "the configuration wants its service left alone");
    }
    if listed || unit.serves.as_deref().is_some_and(is_listed) {
        return act(Class::Never, "a restart would end sessions or the system's own services");
    }
    // On a live system the image's word is not enough to stop anything.
    if let Some(wish) = unit.wish.filter(|wish| flow == Flow::Bootstrap || matches!(wish, Wish::Reload | Wish::Never))
        && let Some(action) = wished(wish, &format!("its {KEY}= wants this"))
    {
        return Some(action);
    }
    // Also if it is gone: nothing of it runs, and what requires it would be stopped with it.
    if unit.oneshot && unit.changed.is_empty() {
        return act(Class::None, "it has done its work, which is not done again");
    }
    if name.ends_with(".mount") {
        return act(Class::None, "what is mounted stays mounted");
    }
    if flow == Flow::Live {
        return match LIVE.contains(&name) {
            true if !leaves => act(Class::Restart, "new logins need it, and no session ends with it"),
            _ => act(Class::Never, "a live system's services are not touched"),
        };
    }
    if leaves {
        return act(Class::Stop, "");
    }
    if unit.connection {
        return act(Class::Never, "it serves one connection, the next one gets the new code");
    }
    if unit.netlink {
        return act(Class::Never, "the kernel's messages would be lost while nobody listens");
    }
    if unit.difference == Difference::Reload && unit.changed.is_empty() && unit.reloadable {
        return act(Class::Reload, "");
    }
    restart(unit, act(Class::Restart, ""))
}

/// A new socket makes its service start anew behind it. Where the service is to stay, so does the socket: the isolate's
/// own attempt to start it changes nothing. On a live system nothing is started.
fn arrive(unit: &UnitState, flow: Flow, policy: &Policy) -> Option<Action> {
    let service = unit.serves.clone().filter(|_| flow == Flow::Bootstrap)?;
    let spared = |name: &str| matches!(policy.of(name), Some((_, Wish::Never))) || is_listed(name);
    let stays = spared(&unit.name) || spared(&service) || unit.wish == Some(Wish::Never) || unit.netlink;
    let what = format!("the node image newly has it, and {service} runs without it");
    if stays {
        return Some(Action::new(&unit.name, Class::Never, format!("{what}; its service is left alone")));
    }
    Some(Action { how: through(unit, service), ..Action::new(&unit.name, Class::Start, what) })
}

/// By way of the socket, which systemd does not start while its service runs.
fn through(unit: &UnitState, service: String) -> How {
    How::SocketOf { service, others: unit.others.clone(), start: unit.wanted }
}

/// Restarts through the socket where there is one.
fn restart(unit: &UnitState, action: Option<Action>) -> Option<Action> {
    let mut action = action?;
    if let Some(service) = &unit.serves {
        action.how = through(unit, service.clone());
    } else if let Some(socket) = unit.sockets.first().filter(|_| !unit.wanted && unit.along.is_empty()) {
        action.how = How::LeftToSocket(socket.clone());
        action.reason = format!("{}; {socket} starts it again when it is needed", action.reason);
    }
    Some(action)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
