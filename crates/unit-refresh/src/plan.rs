//! Decides the action for each unit that runs the bootimage's code or has another definition in the node image. Pure.
//! `docs/units.md` has the rules.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::action::{Action, Class, How, SocketOf};
use super::difference::{Difference, KEY};
use super::policy::{KINDS, OWN, Policy, Wish};
use super::unit::{Kind, Listens, Refusal, Reload, Role, UnitState};

/// The flow in which the pivot runs. It limits the units that the agent may restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Flow {
    /// In the pivot target, before the units of the default target are started. All running units may be restarted.
    Bootstrap,
    /// On a system in use. Nothing that runs may be stopped, except units that new logins need and whose restart ends no
    /// session.
    Live,
}

/// Prefixes of the built-in list: units whose restart would end sessions or stop the agent. They are reported instead.
/// Sources: units that systemd itself marks as not restartable, and units that hold user sessions.
const NEVER: &[&str] = &[
    "dbus.service",
    "dbus-broker.service",
    "dbus.socket",
    LOGIND,
    // The prefix includes the sockets: messages that are logged during their restart would be lost.
    "systemd-journald",
    "user@",
    "user-runtime-dir@",
    "getty@",
    "serial-getty@",
    "console-getty.service",
    "container-getty@",
    // Instances of a socket-activated sshd: each is an active login. New logins get new instances and run new code.
    "ssh@",
    "sshd@",
    "emergency.service",
    "rescue.service",
    // The last way to log in if all others fail.
    "debug-shell.service",
];

/// On the built-in list with one exception: it is restarted if systemd has another release in the node image. A logind of
/// systemd 252 refuses every user manager whose PAM module is of release 256 or later, because it does not know the
/// session class that the module requests. Later releases may add further ones. Since systemd 219, a restart of logind
/// ends no session: logind records its sessions, and systemd holds their devices.
pub(super) const LOGIND: &str = "systemd-logind.service";

/// The only units that the live flow restarts, because new logins need them. Their restart ends no session: each session of
/// sshd has a separate process.
const LIVE: &[&str] = &["ssh.service", "sshd.service", LOGIND];

/// Services whose stop may take interfaces down. A restart would also run the scripts of NetworkManager's dispatcher again,
/// or kill a script that runs.
const NETWORK: &[&str] = &[
    "NetworkManager.service",
    "NetworkManager-dispatcher.service",
    "wpa_supplicant.service",
    "wpa_supplicant@",
    "iwd.service",
    "ovsdb-server.service",
    "ovs-vswitchd.service",
];

/// Returns an action for every unit that changed, in the order of execution: first units that are stopped, then sockets,
/// then all others.
pub fn plan(units: &[UnitState], flow: Flow, policy: &Policy) -> Vec<Action> {
    let mut actions: Vec<_> = units.iter().filter_map(|unit| decide(unit, flow, policy)).collect();
    let planned: BTreeMap<String, Class> = actions.iter().map(|one| (one.unit.clone(), one.class)).collect();
    let states: BTreeMap<&str, &UnitState> = units.iter().map(|unit| (unit.name.as_str(), unit)).collect();
    for action in &mut actions {
        if let Some(unit) = states.get(action.unit.as_str()) {
            protect(action, unit, |name| must_stay(name, planned.get(name), flow, policy));
        }
    }
    pair_sockets(&mut actions);
    actions.sort_by_key(|action| match (action.class, action.unit.ends_with(".socket")) {
        (Class::Stop, _) => 0,
        (_, true) => 1,
        _ => 2,
    });
    actions
}

/// Returns the units that isolating `target` will start and that it would not start without the node image: all units in
/// `added` (newly pulled in by the target) that are not active.
pub fn starts(added: &BTreeSet<String>, active: &BTreeSet<String>, target: &str) -> Vec<Action> {
    let concerned = |name: &&String| KINDS.iter().any(|kind| name.ends_with(kind)) && !active.contains(*name);
    let reason = || format!("newly wanted by {target}, which is isolated at the end");
    let start = |name: &String| Action::new(name, Class::Start, reason());
    added.iter().filter(concerned).map(start).collect()
}

/// Returns the plan of an undo. It is [`plan`]'s, except that the units in `removed`, which only the node image has, are
/// stopped in both flows. They must be stopped before the undo, because the bootimage's `/usr` lacks their programs.
pub fn undo_plan(units: &[UnitState], removed: &[String], flow: Flow, policy: &Policy) -> Vec<Action> {
    let stop = |unit: &String| Action::new(unit, Class::Stop, "only the node image has its unit file");
    let kept = |action: &Action| !removed.contains(&action.unit);
    removed.iter().map(stop).chain(plan(units, flow, policy).into_iter().filter(kept)).collect()
}

/// Returns true if a unit must not be stopped as the dependent of another unit. The unit itself may be unchanged.
fn must_stay(name: &str, planned: Option<&Class>, flow: Flow, policy: &Policy) -> bool {
    // A target has no processes. Its dependents are checked by their own names.
    if name.ends_with(".target") {
        return false;
    }
    match (planned, policy.of(name)) {
        (Some(class), _) if *class != Class::None => *class == Class::Never,
        (_, Some((_, wish))) => wish == Wish::Never,
        // A scope holds processes that systemd did not start and cannot start again. Mounts and swaps are in use.
        _ => {
            let kind = [".scope", ".mount", ".swap"].iter().any(|kind| name.ends_with(kind));
            flow == Flow::Live || kind || is_listed(name) || name.starts_with(OWN)
        }
    }
}

/// Changes an action to [`Class::Never`] if systemd would refuse it, or if it would stop a dependent that must keep running.
fn protect(action: &mut Action, unit: &UnitState, must_stay: impl Fn(&str) -> bool) {
    if !matches!(action.class, Class::Stop | Class::Restart | Class::Start) {
        return;
    }
    let others = unit.serves().into_iter().flat_map(|serves| &serves.others);
    let why = match (unit.dependents.iter().chain(others).find(|name| must_stay(name)), unit.refuses) {
        (Some(name), _) => format!("this would also stop {name}, which must keep running"),
        (None, Some(Refusal::Stop)) => "systemd refuses to stop it manually (RefuseManualStop=)".to_owned(),
        (None, Some(Refusal::Start)) if action.class != Class::Stop => {
            "systemd refuses to start it manually (RefuseManualStart=)".to_owned()
        }
        (None, _) => {
            action.dependents.clone_from(&unit.dependents);
            return;
        }
    };
    *action = Action::new(&action.unit, Class::Never, format!("{}; {why}", action.reason));
}

/// Combines the actions of sockets and their services. A service is restarted together with its socket. A socket whose
/// service must keep running is left alone.
fn pair_sockets(actions: &mut [Action]) {
    let class_of: BTreeMap<String, Class> = actions.iter().map(|action| (action.unit.clone(), action.class)).collect();
    let mut with: BTreeMap<String, String> = BTreeMap::new();
    for action in actions.iter_mut() {
        let How::SocketOf(SocketOf { service, start, .. }) = &mut action.how else { continue };
        if class_of.get(service) == Some(&Class::Never) {
            let reason = format!("{}; {service}, which it starts, is not restarted", action.reason);
            *action = Action::new(&action.unit, Class::Never, reason);
        } else if let Some(first) = with.get(service).filter(|_| action.class == Class::Restart) {
            action.how = How::WithSocket(first.clone());
        } else {
            with.insert(service.clone(), action.unit.clone());
            if class_of.get(service) == Some(&Class::Stop) {
                *start = false;
                action.dependents.clear();
            }
        }
    }
    for action in actions.iter_mut().filter(|one| matches!(one.class, Class::Restart | Class::Reload)) {
        if let Some(socket) = with.get(&action.unit) {
            // The restart of the socket supersedes a reload.
            action.class = Class::Restart;
            action.how = How::WithSocket(socket.clone());
        }
    }
}

/// Describes the changes of a unit; `None` if it did not change.
fn change(unit: &UnitState) -> Option<String> {
    let rest = |more: usize| if more > 1 { format!(" and {} more", more - 1) } else { String::new() };
    let code = unit.changed.first().map(|first| format!("/usr/{first}{} changed", rest(unit.changed.len())));
    let definition = match &unit.difference {
        Difference::Same => None,
        Difference::Reload => Some("its ExecReload= changed".to_owned()),
        Difference::Changed(keys) => {
            keys.first().map(|first| format!("{first}{} changed in its unit", rest(keys.len())))
        }
        Difference::Gone => Some("its unit file is missing".to_owned()),
        Difference::Masked => Some("it is masked".to_owned()),
    };
    match (code, definition) {
        (Some(code), Some(definition)) => Some(format!("{definition}, {code}")),
        (code, definition) => definition.or(code),
    }
}

fn is_listed(name: &str) -> bool {
    why_listed(name).is_some()
}

/// Returns the reason why a unit is on the built-in list.
fn why_listed(name: &str) -> Option<&'static str> {
    let has_prefix = |list: &[&str]| list.iter().any(|prefix| name.starts_with(prefix));
    if has_prefix(NETWORK) {
        return Some("a restart may take interfaces down");
    }
    has_prefix(NEVER).then_some("a restart would end sessions or the system's own services")
}

fn decide(unit: &UnitState, flow: Flow, policy: &Policy) -> Option<Action> {
    if let Kind::AddedSocket { listens, serves } = &unit.kind {
        return decide_added_socket(unit, *listens, serves, flow, policy);
    }
    let change = change(unit)?;
    let name = unit.name.as_str();
    let act = |class, why: &str| {
        let reason = if why.is_empty() { change.clone() } else { format!("{change}; {why}") };
        Some(Action::new(name, class, reason))
    };
    if name.starts_with(OWN) {
        return act(Class::Never, "the agent's own units are never touched");
    }
    let service = unit.service();
    let serves = unit.serves().map(|serves| serves.service.as_str());
    let removed = matches!(unit.difference, Difference::Gone | Difference::Masked);
    let wished = |wish, whose: &str| match wish {
        Wish::Never => act(Class::Never, whose),
        Wish::Stop => act(Class::Stop, whose),
        // A unit without a unit file cannot be reloaded or restarted.
        _ if removed => None,
        Wish::Reload if service.reload == Reload::Supported => act(Class::Reload, whose),
        Wish::Reload => act(Class::Never, &format!("{whose}, but it has no ExecReload=")),
        Wish::Restart => restart(unit, act(Class::Restart, whose)),
    };
    let listed = why_listed(name).filter(|_| service.role != Role::OutdatedLogind);
    // Only an exact name overrides the built-in list: a pattern may match more units than its author intended.
    if let Some((pattern, wish)) = policy.of(name).filter(|(pattern, _)| listed.is_none() || *pattern == name)
        && let Some(action) = wished(wish, &format!("the configuration requests {wish} for \"{pattern}\""))
    {
        return Some(action);
    }
    let is_never = |service: &str| matches!(policy.of(service), Some((_, Wish::Never)));
    if serves.is_some_and(is_never) {
        return act(Class::Never, "the configuration requests never for its service");
    }
    if let Some(why) = listed.or_else(|| why_listed(serves?)) {
        return act(Class::Never, why);
    }
    // On a live system an image alone cannot cause a unit to be stopped.
    if let Some(wish) = unit.wish.filter(|wish| flow == Flow::Bootstrap || matches!(wish, Wish::Reload | Wish::Never))
        && let Some(action) = wished(wish, &format!("its {KEY}= requests {wish}"))
    {
        return Some(action);
    }
    // Also without a unit file: it has no processes, and a stop would also stop its dependents.
    if service.role == Role::Oneshot && unit.changed.is_empty() {
        return act(Class::None, "oneshot already completed; not run again");
    }
    if unit.kind == Kind::Mount {
        return act(Class::None, "mounts are kept");
    }
    if flow == Flow::Live {
        return match LIVE.contains(&name) {
            true if !removed => act(Class::Restart, "new logins need it, and its restart ends no session"),
            _ => act(Class::Never, "units of a live system are not stopped"),
        };
    }
    if removed {
        return act(Class::Stop, "");
    }
    if service.role == Role::Connection {
        return act(Class::Never, "it serves one connection; new connections get the new code");
    }
    if matches!(unit.kind, Kind::Socket { listens: Listens::Netlink, .. }) {
        return act(Class::Never, "the kernel's netlink messages would be lost during the restart");
    }
    if unit.difference == Difference::Reload && unit.changed.is_empty() && service.reload == Reload::Supported {
        return act(Class::Reload, "");
    }
    restart(unit, act(Class::Restart, ""))
}

/// Plans a new socket of a running service: the service is stopped and started after the socket. If the service must keep
/// running, the socket is left alone; the isolate then fails to start it, without further effect. On a live system no
/// socket is started.
fn decide_added_socket(
    unit: &UnitState,
    listens: Listens,
    serves: &SocketOf,
    flow: Flow,
    policy: &Policy,
) -> Option<Action> {
    if flow == Flow::Live {
        return None;
    }
    let is_kept = |name: &str| matches!(policy.of(name), Some((_, Wish::Never))) || is_listed(name);
    let requested = unit.wish == Some(Wish::Never) || is_kept(&unit.name) || is_kept(&serves.service);
    let change = format!("new in the node image, and {} runs without it", serves.service);
    if requested || listens == Listens::Netlink {
        return Some(Action::new(&unit.name, Class::Never, format!("{change}; its service is left alone")));
    }
    Some(Action { how: How::SocketOf(serves.clone()), ..Action::new(&unit.name, Class::Start, change) })
}

/// Adds the order of jobs for sockets to a restart.
fn restart(unit: &UnitState, action: Option<Action>) -> Option<Action> {
    let mut action = action?;
    if let Some(serves) = unit.serves() {
        action.how = How::SocketOf(serves.clone());
    } else if let Some(socket) = unit.service().left_to.filter(|_| unit.dependents.is_empty()) {
        action.reason = format!("{}; {socket} starts it at the next connection", action.reason);
        action.how = How::LeftToSocket(socket);
    }
    Some(action)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
