//! What to do about a unit that still runs the bootimage's code: a total function of plain data.

use serde::{Deserialize, Serialize};

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

/// A service with processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningUnit {
    /// `sshd.service`.
    pub name: String,
    /// Files under `/usr`, relative to it, that its processes execute or map and that differ in the
    /// node image. Empty when it runs nothing old.
    pub changed: Vec<String>,
}

/// What happens to a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// It runs nothing that changed.
    None,
    /// Restarted after the switch.
    Restart,
    /// Left alone on purpose; reported as still running the bootimage's code.
    Never,
    /// Stopped before an undo: its unit file goes with the node image's `/usr`.
    Stop,
}

impl Class {
    /// The word in the journal and in the plan.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::None => "none",
            Class::Restart => "restart",
            Class::Never => "never",
            Class::Stop => "stop",
        }
    }
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
}

/// Units whose restart would take the system, a session or us down. Reported instead.
/// Sources: what systemd itself marks as not restartable, and what holds user sessions.
const NEVER: &[&str] = &[
    "dbus.service",
    "dbus-broker.service",
    "systemd-journald.service",
    "systemd-journald@",
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
    "node-image-",
];

/// The only units that the live flow restarts, because new logins need them. No session ends with either: sshd's
/// are processes of their own, and logind keeps them on record and their devices with systemd (it is restarted
/// at will since systemd 219). A logind of systemd 252 left alone would refuse every user manager whose PAM module is
/// of 256 or later, which asks for a class of session that it does not know.
const LIVE: &[&str] = &["ssh.service", "sshd.service", "systemd-logind.service"];

/// Decides for every running unit, in the order given.
pub fn plan(running: &[RunningUnit], flow: Flow) -> Vec<Action> {
    running.iter().map(|unit| decide(unit, flow)).collect()
}

/// The plan of an undo: that of [`plan`], except that units which only the node image has are stopped, in
/// both flows: what they run is about to go, and the bootimage's programs cannot stop them later.
pub fn undo_plan(running: &[RunningUnit], leaving: &[String], flow: Flow) -> Vec<Action> {
    let stop = |unit: &String| Action {
        unit: unit.clone(),
        class: Class::Stop,
        reason: "only the node image has its unit file".into(),
    };
    let stays = |action: &Action| !leaving.contains(&action.unit);
    leaving.iter().map(stop).chain(plan(running, flow).into_iter().filter(stays)).collect()
}

fn decide(unit: &RunningUnit, flow: Flow) -> Action {
    let act = |class, reason: String| Action { unit: unit.name.clone(), class, reason };
    let Some(first) = unit.changed.first() else {
        return act(Class::None, "runs nothing that the node image changes".into());
    };
    let what = match unit.changed.len() {
        1 => format!("/usr/{first} changed"),
        more => format!("/usr/{first} and {} more changed", more - 1),
    };
    if NEVER.iter().any(|prefix| unit.name.starts_with(prefix)) {
        return act(Class::Never, format!("{what}; a restart would end sessions or the system's own services"));
    }
    if flow == Flow::Live && !LIVE.contains(&unit.name.as_str()) {
        return act(Class::Never, format!("{what}; a live system's services are not touched"));
    }
    act(Class::Restart, what)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unit(name: &str, changed: &[&str]) -> RunningUnit {
        RunningUnit { name: name.into(), changed: changed.iter().map(|&path| path.into()).collect() }
    }

    #[test]
    fn table() {
        use Class::{Never, None, Restart};
        use Flow::{Bootstrap, Live};
        for (name, changed, flow, class) in [
            ("ssh.service", vec!["sbin/sshd"], Bootstrap, Restart),
            ("ssh.service", vec!["sbin/sshd"], Live, Restart),
            ("ssh.service", vec![], Bootstrap, None),
            ("systemd-logind.service", vec!["lib/systemd/systemd-logind"], Bootstrap, Restart),
            ("systemd-logind.service", vec!["lib/systemd/systemd-logind"], Live, Restart),
            ("systemd-udevd.service", vec!["bin/udevadm"], Bootstrap, Restart),
            ("systemd-udevd.service", vec!["bin/udevadm"], Live, Never),
            ("dbus.service", vec!["bin/dbus-daemon"], Bootstrap, Never),
            ("systemd-journald.service", vec!["lib/systemd/systemd-journald"], Bootstrap, Never),
            ("user@1000.service", vec!["lib/systemd/systemd"], Bootstrap, Never),
            ("serial-getty@ttyS0.service", vec!["sbin/agetty"], Bootstrap, Never),
            ("ssh@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Bootstrap, Never),
            ("sshd@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Bootstrap, Never),
            ("sshd@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Live, Never),
            ("node-image-pivotd.service", vec!["lib/libc.so.6"], Bootstrap, Never),
        ] {
            let actions = plan(&[unit(name, &changed)], flow);
            assert_eq!(actions[0].class, class, "{name} {changed:?} {flow:?}: {}", actions[0].reason);
        }
    }

    #[test]
    fn an_undo_stops_what_leaves_and_plans_the_rest() {
        let running = [unit("crio.service", &["bin/crio"]), unit("ssh.service", &["sbin/sshd"])];
        let leaving = ["crio.service".to_owned(), "new.timer".to_owned()];
        for flow in [Flow::Bootstrap, Flow::Live] {
            let actions = undo_plan(&running, &leaving, flow);
            let classes: Vec<_> = actions.iter().map(|action| (action.unit.as_str(), action.class)).collect();
            let stop = Class::Stop;
            assert_eq!(classes, [("crio.service", stop), ("new.timer", stop), ("ssh.service", Class::Restart)]);
        }
    }

    proptest! {
        /// A live system loses nothing but what logins need anew, whatever runs.
        #[test]
        fn live_restarts_only_what_logins_need(names in proptest::collection::vec("[a-z@-]{1,20}\\.service", 0..20)) {
            let running: Vec<_> = names.iter().map(|name| unit(name, &["bin/x"])).collect();
            for action in plan(&running, Flow::Live) {
                prop_assert!(action.class != Class::Restart || LIVE.contains(&action.unit.as_str()));
            }
        }

        /// Every unit gets exactly one decision, and what runs nothing old is never touched.
        #[test]
        fn total(names in proptest::collection::vec("[a-z@-]{1,20}\\.service", 0..20), live: bool) {
            let running: Vec<_> = names.iter().map(|name| unit(name, &[])).collect();
            let actions = plan(&running, if live { Flow::Live } else { Flow::Bootstrap });
            prop_assert_eq!(actions.len(), running.len());
            prop_assert!(actions.iter().all(|action| action.class == Class::None));
        }
    }
}
