#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::super::action::Verb;
use super::super::unit::Service;
use super::*;

#[path = "plan_socket_tests.rs"]
mod sockets;

const FLOWS: [Flow; 2] = [Flow::Bootstrap, Flow::Live];

fn unit(name: &str, changed: &[&str]) -> UnitState {
    let changed = changed.iter().map(|&path| path.into()).collect();
    let kind = match name.rsplit_once('.') {
        Some((_, "service")) => Kind::Service(Service::default()),
        Some((_, "socket")) => Kind::Socket { listens: Listens::Others, serves: None },
        Some((_, "mount")) => Kind::Mount,
        _ => Kind::Trigger,
    };
    UnitState { name: name.into(), changed, kind, ..UnitState::default() }
}

fn with_role(role: Role, unit: UnitState) -> UnitState {
    UnitState { kind: Kind::Service(Service { role, ..unit.service() }), ..unit }
}

fn reloadable(unit: UnitState) -> UnitState {
    UnitState { kind: Kind::Service(Service { reload: Reload::Supported, ..unit.service() }), ..unit }
}

/// Returns a service that the socket starts at the next connection.
fn left_to(socket: &str, unit: UnitState) -> UnitState {
    UnitState { kind: Kind::Service(Service { left_to: Some(socket.into()), ..unit.service() }), ..unit }
}

/// Returns a socket that has started `service`.
fn serving(service: &str, unit: UnitState) -> UnitState {
    let serves = Some(SocketOf { service: service.into(), ..SocketOf::default() });
    UnitState { kind: Kind::Socket { listens: Listens::Others, serves }, ..unit }
}

/// Returns a unit whose definition changed.
fn edited(name: &str) -> UnitState {
    UnitState { difference: Difference::Changed(vec!["[Service] User=".into()]), ..unit(name, &[]) }
}

fn class(unit: UnitState, flow: Flow, policy: &Policy) -> Option<Class> {
    plan(&[unit], flow, policy).first().map(|action| action.class)
}

#[test]
fn units_with_changed_code() {
    use Class::{Never, Restart};
    use Flow::{Bootstrap, Live};
    for (name, changed, flow, expected) in [
        ("ssh.service", vec!["sbin/sshd"], Bootstrap, Some(Restart)),
        ("ssh.service", vec!["sbin/sshd"], Live, Some(Restart)),
        ("ssh.service", vec![], Bootstrap, None),
        ("systemd-logind.service", vec!["lib/systemd/systemd-logind"], Bootstrap, Some(Never)),
        ("systemd-logind.service", vec!["lib/systemd/systemd-logind"], Live, Some(Never)),
        ("systemd-udevd.service", vec!["bin/udevadm"], Bootstrap, Some(Restart)),
        ("systemd-udevd.service", vec!["bin/udevadm"], Live, Some(Never)),
        ("dbus.service", vec!["bin/dbus-daemon"], Bootstrap, Some(Never)),
        ("dbus-broker.service", vec!["bin/dbus-broker"], Bootstrap, Some(Never)),
        ("NetworkManager.service", vec!["sbin/NetworkManager"], Bootstrap, Some(Never)),
        ("NetworkManager.service", vec!["sbin/NetworkManager"], Live, Some(Never)),
        ("NetworkManager-dispatcher.service", vec!["lib/libc.so.6"], Bootstrap, Some(Never)),
        ("wpa_supplicant@wlan0.service", vec!["sbin/wpa_supplicant"], Bootstrap, Some(Never)),
        ("polkit.service", vec!["lib/polkit-1/polkitd"], Bootstrap, Some(Restart)),
        ("chronyd.service", vec!["sbin/chronyd"], Bootstrap, Some(Restart)),
        ("systemd-journald.service", vec!["lib/systemd/systemd-journald"], Bootstrap, Some(Never)),
        ("user@1000.service", vec!["lib/systemd/systemd"], Bootstrap, Some(Never)),
        ("serial-getty@ttyS0.service", vec!["sbin/agetty"], Bootstrap, Some(Never)),
        ("ssh@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Bootstrap, Some(Never)),
        ("sshd@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Bootstrap, Some(Never)),
        ("sshd@3-10.0.0.1:22-10.0.0.2:4711.service", vec!["sbin/sshd"], Live, Some(Never)),
        ("sshd.service", vec!["sbin/sshd"], Live, Some(Restart)),
        ("node-image-pivotd.service", vec!["lib/libc.so.6"], Bootstrap, Some(Never)),
    ] {
        assert_eq!(class(unit(name, &changed), flow, &Policy::default()), expected, "{name} {changed:?} {flow:?}");
    }
}

/// Also where the node image lacks or masks it, or changes only its definition, and the image requests a restart.
#[test]
fn network_manager_keeps_running_unless_the_configuration_names_it() {
    let removed = [Difference::Gone, Difference::Masked, Difference::Changed(vec!["[Service] ExecStart=".into()])];
    for difference in removed {
        let unit = UnitState {
            difference,
            wish: Some(Wish::Restart),
            ..unit("NetworkManager.service", &["sbin/NetworkManager"])
        };
        let policy = |pattern| Policy::new([(pattern, "stop")]).unwrap();
        for flow in FLOWS {
            assert_eq!(class(unit.clone(), flow, &Policy::default()), Some(Class::Never));
            assert_eq!(class(unit.clone(), flow, &policy("Network*")), Some(Class::Never), "only by its name");
            assert_eq!(class(unit.clone(), flow, &policy("NetworkManager.service")), Some(Class::Stop));
        }
    }
    let action =
        &plan(&[unit("NetworkManager.service", &["sbin/NetworkManager"])], Flow::Bootstrap, &Policy::default())[0];
    assert_eq!(action.reason, "/usr/sbin/NetworkManager changed; a restart may take interfaces down");
}

/// A logind that kept running would refuse the PAM module of the next login.
#[test]
fn logind_is_restarted_for_another_systemd_release() {
    let of = |role, name: &str| with_role(role, unit(name, &["lib/systemd/systemd-logind"]));
    for flow in FLOWS {
        let class_of = |unit| class(unit, flow, &Policy::default());
        assert_eq!(class_of(of(Role::OutdatedLogind, "systemd-logind.service")), Some(Class::Restart));
        assert_eq!(class_of(of(Role::Daemon, "systemd-logind.service")), Some(Class::Never));
        assert_eq!(class_of(of(Role::Daemon, "dbus.service")), Some(Class::Never), "only logind");
        let policy = Policy::new([("systemd-logind.service", "never")]).unwrap();
        assert_eq!(class(of(Role::OutdatedLogind, "systemd-logind.service"), flow, &policy), Some(Class::Never));
    }
}

/// systemd accepts such jobs only as dependencies of other jobs.
#[test]
fn jobs_that_systemd_refuses_are_not_planned() {
    use Class::{Never, Reload, Restart, Stop};
    let of = |refuses, state| UnitState { refuses, ..state };
    let gone = || UnitState { difference: Difference::Gone, ..unit("a.service", &[]) };
    let reload = || reloadable(UnitState { difference: Difference::Reload, ..unit("a.service", &[]) });
    for (refuses, restart, stop) in
        [(None, Restart, Stop), (Some(Refusal::Stop), Never, Never), (Some(Refusal::Start), Never, Stop)]
    {
        let class_of = |state, policy: &Policy| class(of(refuses, state), Flow::Bootstrap, policy);
        assert_eq!(class_of(edited("auditd.service"), &Policy::default()), Some(restart), "{refuses:?}");
        assert_eq!(class_of(gone(), &Policy::default()), Some(stop), "{refuses:?}");
        assert_eq!(class_of(reload(), &Policy::default()), Some(Reload), "{refuses:?}");
        let wanted = Policy::new([("auditd.service", "restart")]).unwrap();
        assert_eq!(class_of(edited("auditd.service"), &wanted), Some(restart), "also if the configuration requests it");
    }
    let actions = plan(&[of(Some(Refusal::Stop), edited("auditd.service"))], Flow::Bootstrap, &Policy::default());
    assert_eq!(
        actions[0].reason,
        "[Service] User= changed in its unit; systemd refuses to stop it manually (RefuseManualStop=)"
    );
}

#[test]
fn dependents_that_must_keep_running_protect_a_unit() {
    use Class::{Never, Restart};
    let with_dependents = |name: &str, dependents: &[&str]| UnitState {
        dependents: dependents.iter().map(|&name| name.to_owned()).collect(),
        ..edited(name)
    };
    let policy = Policy::new([("agent.service", "never"), ("ours.service", "restart")]).unwrap();
    for (dependents, bootstrap, live) in [
        (vec![], Restart, Restart),
        (vec!["b.service"], Restart, Never),
        (vec!["some.target"], Restart, Restart),
        (vec!["b.service", "dbus.service"], Never, Never),
        (vec!["user@1000.service"], Never, Never),
        (vec!["node-image-pivotd.service"], Never, Never),
        (vec!["agent.service"], Never, Never),
        (vec!["ours.service"], Restart, Restart),
        (vec!["libpod-1.scope"], Never, Never),
        (vec!["srv.mount"], Never, Never),
    ] {
        for (flow, expected) in FLOWS.into_iter().zip([bootstrap, live]) {
            assert_eq!(
                class(with_dependents("ssh.service", &dependents), flow, &policy),
                Some(expected),
                "{dependents:?} {flow:?}"
            );
        }
    }
    let of = |units: &[UnitState]| -> Vec<(String, Class)> {
        let actions = plan(units, Flow::Bootstrap, &Policy::default());
        actions.into_iter().map(|action| (action.unit, action.class)).collect()
    };
    // The dependent must keep running by its unit file, or is restarted anyway.
    let b = |wish| UnitState { wish, ..edited("b.service") };
    let a = with_dependents("a.service", &["b.service"]);
    let named = |name: &str, class| (name.to_owned(), class);
    assert_eq!(of(&[a.clone(), b(Some(Wish::Never))]), [named("a.service", Never), named("b.service", Never)]);
    assert_eq!(of(&[a.clone(), b(None)]), [named("a.service", Restart), named("b.service", Restart)]);
    // A socket whose service must keep running because of its dependents.
    let service = left_to("a.socket", with_dependents("a.service", &["dbus.service"]));
    let socket = serving("a.service", edited("a.socket"));
    assert_eq!(of(&[service, socket]), [named("a.socket", Never), named("a.service", Never)]);
    assert!(
        plan(&[with_dependents("a.service", &["dbus.service"])], Flow::Bootstrap, &policy)[0]
            .reason
            .contains("stop dbus.service")
    );
}

#[test]
fn units_with_a_changed_definition() {
    use Class::{Never, None as Nothing, Reload, Restart, Stop};
    let of = |difference, name| UnitState { difference, ..unit(name, &[]) };
    let gone = of(Difference::Gone, "a.service");
    let reload = reloadable(of(Difference::Reload, "a.service"));
    let oneshot = with_role(Role::Oneshot, edited("a.service"));
    let netlink = Kind::Socket { listens: Listens::Netlink, serves: None };
    for (state, bootstrap, live) in [
        (of(Difference::Same, "a.service"), None, None),
        (edited("a.service"), Some(Restart), Some(Never)),
        (edited("a.timer"), Some(Restart), Some(Never)),
        (edited("a.path"), Some(Restart), Some(Never)),
        (edited("a.mount"), Some(Nothing), Some(Nothing)),
        (edited("ssh.service"), Some(Restart), Some(Restart)),
        (edited("dbus.service"), Some(Never), Some(Never)),
        (reload.clone(), Some(Reload), Some(Never)),
        (reloadable(edited("a.service")), Some(Restart), Some(Never)),
        // ExecReload= was removed.
        (of(Difference::Reload, "a.service"), Some(Restart), Some(Never)),
        // A reload does not load new code.
        (UnitState { changed: vec!["bin/a".into()], ..reload }, Some(Restart), Some(Never)),
        (oneshot.clone(), Some(Nothing), Some(Nothing)),
        (UnitState { difference: Difference::Gone, ..oneshot.clone() }, Some(Nothing), Some(Nothing)),
        (UnitState { changed: vec!["bin/a".into()], ..oneshot }, Some(Restart), Some(Never)),
        (gone.clone(), Some(Stop), Some(Never)),
        (of(Difference::Masked, "a.timer"), Some(Stop), Some(Never)),
        (of(Difference::Gone, "ssh.service"), Some(Stop), Some(Never)),
        (of(Difference::Gone, "user@0.service"), Some(Never), Some(Never)),
        (with_role(Role::Connection, edited("a@1.service")), Some(Never), Some(Never)),
        (UnitState { kind: netlink, ..edited("a.socket") }, Some(Never), Some(Never)),
    ] {
        for (flow, expected) in FLOWS.into_iter().zip([bootstrap, live]) {
            assert_eq!(class(state.clone(), flow, &Policy::default()), expected, "{state:?} {flow:?}");
        }
    }
    let reason = &plan(&[gone], Flow::Bootstrap, &Policy::default())[0].reason;
    assert_eq!(reason, "its unit file is missing");
}

#[test]
fn the_built_in_list_is_documented() {
    let text = include_str!("../../../docs/units.md").split("The built-in list: ").nth(1).unwrap();
    for name in text.split("\n4. ").next().unwrap().split('`').skip(1).step_by(2) {
        let unit = edited(&name.replace('*', "1.service"));
        assert_eq!(class(unit, Flow::Bootstrap, &Policy::default()), Some(Class::Never), "{name}");
    }
}

#[test]
fn reasons_name_the_change_and_actions_are_serialized() {
    let and_code = UnitState { changed: vec!["bin/a".into()], ..edited("a.service") };
    let keys = vec!["[Service] User=".to_owned(), "[Service] Group=".to_owned()];
    let of = |difference| UnitState { difference, ..unit("a.service", &[]) };
    let left = left_to("a.socket", of(Difference::Reload));
    for (state, expected) in [
        (left, "its ExecReload= changed; a.socket starts it at the next connection"),
        (unit("a.service", &["bin/a"]), "/usr/bin/a changed"),
        (unit("a.service", &["bin/a", "lib/b", "lib/c"]), "/usr/bin/a and 2 more changed"),
        (and_code, "[Service] User= changed in its unit, /usr/bin/a changed"),
        (of(Difference::Changed(keys)), "[Service] User= and 1 more changed in its unit"),
        (of(Difference::Reload), "its ExecReload= changed"),
        (of(Difference::Masked), "it is masked"),
    ] {
        let action = plan(std::slice::from_ref(&state), Flow::Bootstrap, &Policy::default()).remove(0);
        assert_eq!(action.reason, expected);
        let written = serde_json::to_value(&action).unwrap();
        assert_eq!(written["class"], action.class.as_str());
        assert_eq!(written.get("how").is_some(), state.service().left_to.is_some(), "only for sockets");
        assert_eq!(serde_json::from_value::<Action>(written).unwrap(), action);
    }
}

#[test]
fn actions_in_journals_of_earlier_agents_are_read() {
    let text = r#"[{"unit":"a.socket","class":"restart","reason":"r","along":["b.service"],
        "how":{"socket-of":{"service":"a.service","others":["c.socket"],"start":true}}},
        {"unit":"d.socket","class":"start","reason":"r","how":{"socket-of":{"service":"d.service","start":false}}},
        {"unit":"a.service","class":"restart","reason":"r","how":{"with-socket":"a.socket"}}]"#;
    let socket_of = |service: &str, others, start| How::SocketOf(SocketOf { service: service.into(), others, start });
    let of = |unit: &str, class, how| Action { how, ..Action::new(unit, class, "r") };
    let first = of("a.socket", Class::Restart, socket_of("a.service", vec!["c.socket".into()], true));
    assert_eq!(
        serde_json::from_str::<Vec<Action>>(text).unwrap(),
        [
            Action { dependents: vec!["b.service".into()], ..first },
            of("d.socket", Class::Start, socket_of("d.service", Vec::new(), false)),
            of("a.service", Class::Restart, How::WithSocket("a.socket".into())),
        ]
    );
}

#[test]
fn configuration_wins_over_the_built_in_list_and_the_image() {
    use Class::{Never, Reload, Restart, Stop};
    let policy =
        |word| Policy::new([("a.service", word), ("node*", word), ("d*", word), ("dbus.service", word)]).unwrap();
    let key = |wish| reloadable(UnitState { wish: Some(wish), ..edited("b.service") });
    let a = || reloadable(UnitState { wish: Some(Wish::Never), ..edited("a.service") });
    for (state, policy, bootstrap, live) in [
        // The key in the unit file alone.
        (key(Wish::Reload), Policy::default(), Reload, Reload),
        (key(Wish::Never), Policy::default(), Never, Never),
        (key(Wish::Stop), Policy::default(), Stop, Never),
        (key(Wish::Restart), Policy::default(), Restart, Never),
        (UnitState { wish: Some(Wish::Reload), ..edited("b.service") }, Policy::default(), Never, Never),
        // The configuration wins over the key, in both flows.
        (a(), policy("restart"), Restart, Restart),
        (a(), policy("reload"), Reload, Reload),
        (a(), policy("stop"), Stop, Stop),
        // An exact name overrides the built-in list, but not the protection of the agent's own units.
        (edited("dbus.service"), policy("restart"), Restart, Restart),
        (edited("node-image-pivotd.service"), policy("restart"), Never, Never),
        // A pattern does not override the built-in list.
        (edited("dbus-broker.service"), policy("restart"), Never, Never),
        (edited("debug-shell.service"), policy("restart"), Never, Never),
        // The key does not override the built-in list.
        (UnitState { wish: Some(Wish::Restart), ..edited("dbus.service") }, Policy::default(), Never, Never),
        // A unit without a unit file cannot be restarted.
        (UnitState { difference: Difference::Gone, ..a() }, policy("restart"), Never, Never),
    ] {
        for (flow, expected) in FLOWS.into_iter().zip([bootstrap, live]) {
            assert_eq!(class(state.clone(), flow, &policy), Some(expected), "{state:?} {flow:?}");
        }
    }
    assert_eq!(class(unit("a.service", &[]), Flow::Bootstrap, &policy("restart")), None, "nothing changed");
}

#[test]
fn removed_units_are_first_and_sockets_before_services() {
    let gone = UnitState { difference: Difference::Gone, ..unit("z.service", &[]) };
    let actions = plan(&[edited("a.service"), edited("b.socket"), gone], Flow::Bootstrap, &Policy::default());
    let names: Vec<_> = actions.iter().map(|action| action.unit.as_str()).collect();
    assert_eq!(names, ["z.service", "b.socket", "a.service"]);
}

#[test]
fn units_that_the_node_image_starts() {
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
    let added = set(&["kubelet.service", "x.target", "running.service"]);
    let actions = starts(&added, &set(&["running.service"]), "multi-user.target");
    assert_eq!(actions.len(), 1);
    assert_eq!((actions[0].unit.as_str(), actions[0].class), ("kubelet.service", Class::Start));
    assert!(actions[0].jobs().is_empty(), "the isolate starts it");
}

#[test]
fn an_undo_stops_removed_units_and_plans_the_others() {
    let running = [unit("crio.service", &["bin/crio"]), unit("ssh.service", &["sbin/sshd"])];
    let removed = ["crio.service".to_owned(), "new.timer".to_owned()];
    for flow in FLOWS {
        let actions = undo_plan(&running, &removed, flow, &Policy::default());
        let classes: Vec<_> = actions.iter().map(|action| (action.unit.as_str(), action.class)).collect();
        let stop = Class::Stop;
        assert_eq!(classes, [("crio.service", stop), ("new.timer", stop), ("ssh.service", Class::Restart)]);
    }
}

fn states() -> impl Strategy<Value = Vec<UnitState>> {
    let difference = prop_oneof![
        Just(Difference::Same),
        Just(Difference::Reload),
        Just(Difference::Changed(vec!["[Service] User=".into()])),
        Just(Difference::Gone),
        Just(Difference::Masked),
    ];
    let wish = prop_oneof![Just(None), Just(Some(Wish::Restart)), Just(Some(Wish::Stop)), Just(Some(Wish::Reload))];
    let name = "(dbus|ssh|node-image-x|[a-c]{1,2})\\.(service|socket|timer|mount)";
    let role = prop_oneof![Just(Role::Daemon), Just(Role::Oneshot), Just(Role::Connection)];
    let one = (name, difference, wish, role, any::<[bool; 4]>());
    let state = one.prop_map(|(name, difference, wish, role, [code, reloads, netlink, start])| {
        let state = UnitState { difference, wish, ..unit(&name, if code { &["bin/x"] } else { &[] }) };
        let kind = match state.kind {
            Kind::Service(_) => Kind::Service(Service {
                role,
                reload: if reloads { Reload::Supported } else { Reload::Unsupported },
                left_to: (!start).then(|| name.replace(".service", ".socket")),
            }),
            Kind::Socket { .. } => {
                let service = name.replace(".socket", ".service");
                let listens = if netlink { Listens::Netlink } else { Listens::Others };
                Kind::Socket { listens, serves: Some(SocketOf { service, others: Vec::new(), start }) }
            }
            other => other,
        };
        UnitState { kind, ..state }
    });
    proptest::collection::vec(state, 0..8)
}

proptest! {
    /// Without configuration, the plan of a live system stops only units that new logins need.
    #[test]
    fn a_live_system_stops_only_units_for_logins(states in states()) {
        for action in plan(&states, Flow::Live, &Policy::default()) {
            for (verb, name) in action.jobs() {
                prop_assert!(verb == Verb::Reload || LIVE.contains(&name), "{verb:?} {name}");
            }
        }
    }

    /// Every changed unit has an action, and no other unit has one. Units of the built-in list are never touched without
    /// configuration, and the agent's own units never.
    #[test]
    fn every_changed_unit_has_one_action(states in states(), live: bool, word in "(restart|stop|reload)") {
        let flow = FLOWS[usize::from(live)];
        let changed = |state: &&UnitState| !state.changed.is_empty() || state.difference != Difference::Same;
        for policy in [Policy::default(), Policy::new([("*", word.as_str())]).unwrap()] {
            let actions = plan(&states, flow, &policy);
            prop_assert_eq!(actions.len(), states.iter().filter(changed).count());
            for (_, name) in actions.iter().flat_map(Action::jobs) {
                prop_assert!(!name.starts_with(OWN), "{}", name);
                prop_assert!(policy != Policy::default() || !is_listed(name), "{}", name);
            }
        }
    }
}
