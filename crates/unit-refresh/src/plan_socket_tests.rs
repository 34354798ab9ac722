//! Plans for sockets and their services.

use super::*;

/// A new socket of the node image whose service is active.
#[test]
fn a_new_socket_of_a_running_service() {
    let new = |service: &str, start, listens| {
        let serves = SocketOf { service: service.into(), others: Vec::new(), start };
        UnitState { kind: Kind::AddedSocket { listens, serves }, ..unit("a.socket", &[]) }
    };
    let socket = |start| new("a.service", start, Listens::Others);
    let jobs = |units: &[UnitState], flow, policy: &Policy| -> Vec<(Verb, String)> {
        let actions = plan(units, flow, policy);
        actions.iter().flat_map(Action::jobs).map(|(verb, name)| (verb, name.to_owned())).collect()
    };
    let job = |verb, name: &str| (verb, name.to_owned());
    let default = Policy::default();
    let left = [job(Verb::Stop, "a.service"), job(Verb::Start, "a.socket")];
    let again = [left.as_slice(), &[job(Verb::Start, "a.service")]].concat();
    assert_eq!(jobs(&[socket(false)], Flow::Bootstrap, &default), left);
    assert_eq!(jobs(&[socket(true)], Flow::Bootstrap, &default), again);
    assert_eq!(jobs(&[socket(true), edited("a.service")], Flow::Bootstrap, &default), again, "the service changed too");
    assert_eq!(plan(&[socket(true)], Flow::Live, &default), [], "a live system starts no units");
    assert_eq!(plan(&[socket(true)], Flow::Bootstrap, &default)[0].class, Class::Start);
    let never = |name: &str| Policy::new([(name, "never")]).unwrap();
    for (state, policy) in [
        (socket(true), never("a.service")),
        (socket(true), never("a.socket")),
        (new("dbus.service", true, Listens::Others), default.clone()),
        (UnitState { wish: Some(Wish::Never), ..socket(true) }, default.clone()),
        (UnitState { refuses: Some(Refusal::Stop), ..socket(true) }, default.clone()),
        (new("a.service", true, Listens::Netlink), default.clone()),
        (UnitState { dependents: vec!["dbus.service".into()], ..socket(true) }, default.clone()),
    ] {
        let actions = plan(&[state], Flow::Bootstrap, &policy);
        assert_eq!((actions.len(), actions[0].class), (1, Class::Never), "{actions:?}");
    }
    let stays = UnitState { wish: Some(Wish::Never), ..edited("a.service") };
    assert_eq!(
        jobs(&[socket(true), stays], Flow::Bootstrap, &default),
        [],
        "the unit file of its service requests never"
    );
}

#[test]
fn sockets_and_services_are_restarted_together() {
    let jobs = |units: &[UnitState]| -> Vec<(Verb, String)> {
        let actions = plan(units, Flow::Bootstrap, &Policy::default());
        actions
            .iter()
            .flat_map(|action| action.jobs().into_iter().map(|(verb, name)| (verb, name.to_owned())))
            .collect()
    };
    let job = |verb, name: &str| (verb, name.to_owned());
    let changed = || unit("a.service", &["bin/a"]);
    let service = || left_to("a.socket", changed());
    let with_others = |name: &str, others: &[&str], start| {
        let others = others.iter().map(|&name| name.into()).collect();
        let serves = Some(SocketOf { service: "a.service".into(), others, start });
        UnitState { kind: Kind::Socket { listens: Listens::Others, serves }, ..edited(name) }
    };
    let socket = |start| with_others("a.socket", &[], start);
    // The socket keeps listening.
    assert_eq!(jobs(&[service()]), [job(Verb::Stop, "a.service")]);
    assert_eq!(jobs(&[changed()]), [job(Verb::TryRestart, "a.service")]);
    let both = [job(Verb::Stop, "a.socket"), job(Verb::Stop, "a.service"), job(Verb::Start, "a.socket")];
    assert_eq!(jobs(&[service(), socket(false)]), both);
    assert_eq!(jobs(&[socket(false)]), both, "the service is unchanged");
    let and_start = [both.as_slice(), &[job(Verb::Start, "a.service")]].concat();
    assert_eq!(jobs(&[changed(), socket(true)]), and_start);
    // Other sockets of the service would start it in between. Two changed sockets are one action.
    let one = with_others("a.socket", &["b.socket"], false);
    let other = with_others("b.socket", &["a.socket"], false);
    let all = [
        job(Verb::Stop, "a.socket"),
        job(Verb::Stop, "b.socket"),
        job(Verb::Stop, "a.service"),
        job(Verb::Start, "a.socket"),
        job(Verb::Start, "b.socket"),
    ];
    assert_eq!(jobs(std::slice::from_ref(&one)), all);
    assert_eq!(jobs(&[one.clone(), other.clone()]), all);
    let stays = UnitState { wish: Some(Wish::Never), ..other };
    assert_eq!(jobs(&[one, stays]), [], "one of them must keep running");
    // Dependents that stop with the service are started with it. The start is then not left to a connection.
    let with_dependents =
        |unit: UnitState| UnitState { dependents: vec!["x.service".into(), "y.target".into()], ..unit };
    assert_eq!(jobs(&[with_dependents(service())]), [job(Verb::TryRestart, "a.service")]);
    let again = [both.as_slice(), &[job(Verb::Start, "a.service"), job(Verb::Start, "x.service")]].concat();
    assert_eq!(jobs(&[with_dependents(socket(false))]), again);
    // The socket of a service that must keep running is left alone.
    let never = UnitState { wish: Some(Wish::Never), ..service() };
    assert_eq!(jobs(&[never, socket(false)]), []);
    let listed = serving("dbus.service", edited("x.socket"));
    assert_eq!(jobs(&[listed]), []);
    let policy = Policy::new([("a.service", "never")]).unwrap();
    assert_eq!(class(socket(false), Flow::Bootstrap, &policy), Some(Class::Never), "its service must keep running");
    // A stopped service is not reloaded, and a service without a unit file is not started.
    let reload = reloadable(UnitState { wish: Some(Wish::Reload), ..service() });
    assert_eq!(jobs(&[reload, socket(false)]), both);
    let gone = UnitState { difference: Difference::Gone, ..changed() };
    assert_eq!(jobs(&[gone, socket(true)]), [[job(Verb::Stop, "a.service")].as_slice(), &both].concat());
    // A socket that has not started its service yet.
    assert_eq!(jobs(&[edited("a.socket")]), [job(Verb::TryRestart, "a.socket")]);
}
