//! Surveys the active units: the code that the processes of each service run, and the differences of its definition.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Manager;
use super::action::SocketOf;
use super::definition::{Definition, UnitFiles};
use super::difference::{Difference, KEY, compare};
use super::files::release_of;
use super::links::Links;
use super::plan::LOGIND;
use super::policy::Wish;
use super::processes::{Differs, Version, code_of, processes};
use super::scripts;
use super::syntax::is_true;
use super::unit::{Kind, Listens, Refusal, Reload, Role, Service, UnitState};
use super::units::Unit;

/// Definitions by name of the unit.
pub type Definitions = BTreeMap<String, Definition>;

/// The two systems that a survey compares: the one that units were started from, and the one to refresh them to.
pub struct Sides<'a> {
    /// The version of mapped files that counts as old.
    pub version: Version,
    /// Returns true for a path below `/usr` whose content differs between the two systems.
    pub differs: Differs<'a>,
    /// Definitions of the old system, as of the beginning of the switch. Other units are not compared.
    pub old: &'a Definitions,
    /// Unit files of the new system.
    pub new: &'a UnitFiles,
    /// Units that the final target pulls in only in the new system.
    pub added: &'a BTreeSet<String>,
    /// Release of the new system's systemd, if known.
    pub systemd: Option<u32>,
}

/// Returns all active units whose code or definition differs, and a list of warnings. A process that ends during the
/// survey counts as running nothing. A unit that cannot be inspected is left out, with a warning.
///
/// # Errors
/// Fails if PID 1 cannot list its units or closes the connection.
pub async fn survey(manager: &Manager, sides: &Sides<'_>) -> Result<(Vec<UnitState>, Vec<String>)> {
    let mut states = Vec::new();
    let mut warnings = Vec::new();
    let units = manager.list().await?;
    let names =
        |wanted: fn(&Unit) -> bool| units.iter().filter(move |unit| wanted(unit)).map(|unit| unit.name.as_str());
    let active: BTreeSet<&str> = names(Unit::is_active).collect();
    // Units of any type that could be stopped as dependents, also if they are just being started or stopped.
    let present: BTreeSet<&str> = names(|unit| !matches!(unit.active.as_str(), "inactive" | "failed")).collect();
    for unit in units.iter().filter(|unit| unit.is_active()) {
        let inspected = inspect(manager, unit, sides, (&active, &present), &mut warnings).await;
        match inspected.with_context(|| format!("cannot inspect {}", unit.name)) {
            Ok(state) => states.extend(state),
            // The other units cannot be inspected either.
            Err(error) if Manager::is_lost(&error) => return Err(error),
            Err(error) => warnings.push(format!("{error:#}")),
        }
    }
    for (socket, service) in new_sockets(sides, &active) {
        match new_socket(manager, sides, &present, &socket, service, &mut warnings).await {
            Ok(state) => states.push(state),
            Err(error) if Manager::is_lost(&error) => return Err(error),
            Err(error) => warnings.push(format!("cannot inspect the service of {socket}: {error:#}")),
        }
    }
    Ok((states, warnings))
}

/// Returns the new sockets whose services are already active, with these services.
fn new_sockets(sides: &Sides<'_>, active: &BTreeSet<&str>) -> Vec<(String, String)> {
    let sockets = sides.added.iter().filter(|name| name.ends_with(".socket") && !active.contains(name.as_str()));
    let with_service = |socket: &String| {
        let service = sides.new.definition(socket).filter(|socket| !socket.masked)?.service_of(socket)?;
        active.contains(service.as_str()).then(|| (socket.clone(), service))
    };
    sockets.filter_map(with_service).collect()
}

async fn new_socket(
    manager: &Manager,
    sides: &Sides<'_>,
    present: &BTreeSet<&str>,
    socket: &str,
    service: String,
    warnings: &mut Vec<String>,
) -> Result<UnitState> {
    let dependents = dependents(manager, [service.as_str()], present).await?;
    let refuses = sides.new.definition(&service).and_then(refusal);
    let serves = socket_of(manager, socket, service, present).await?;
    let definition = sides.new.definition(socket).unwrap_or_default();
    Ok(UnitState {
        name: socket.to_owned(),
        wish: wish(socket, definition.value("Unit", KEY), warnings),
        dependents,
        refuses,
        kind: Kind::AddedSocket { listens: listens(sides, serves.others.iter().map(String::as_str)), serves },
        ..UnitState::default()
    })
}

/// Returns the `service` of `socket` with its other sockets in `running`.
async fn socket_of(manager: &Manager, socket: &str, service: String, running: &BTreeSet<&str>) -> Result<SocketOf> {
    let links = manager.links_of(&service).await?;
    let others = sockets(&links, running).filter(|name| *name != socket).cloned().collect();
    // A target that is not reached yet counts too.
    Ok(SocketOf { service, others, start: !links.wanted_by.is_empty() })
}

/// Returns the sockets in `running` that start a unit.
fn sockets<'a>(links: &'a Links, running: &BTreeSet<&str>) -> impl Iterator<Item = &'a String> {
    links.triggered_by.iter().filter(|name| name.ends_with(".socket") && running.contains(name.as_str()))
}

/// Returns the active units that systemd stops and restarts with `units`, without `units` themselves.
async fn dependents<'a>(
    manager: &Manager,
    units: impl IntoIterator<Item = &'a str>,
    present: &BTreeSet<&str>,
) -> Result<Vec<String>> {
    let mut pending: Vec<String> = units.into_iter().map(str::to_owned).collect();
    let own = pending.clone();
    let mut seen = BTreeSet::new();
    while let Some(name) = pending.pop() {
        if seen.insert(name.clone()) {
            let links = manager.links_of(&name).await?;
            pending.extend(links.dependents.into_iter().filter(|name| present.contains(name.as_str())));
        }
    }
    Ok(seen.into_iter().filter(|name| !own.contains(name)).collect())
}

/// Parses the action that a unit file requests. An unknown one is ignored with a warning.
fn wish(unit: &str, word: Option<&str>, warnings: &mut Vec<String>) -> Option<Wish> {
    word?.parse().inspect_err(|error| warnings.push(format!("{unit}: {KEY}: {error}"))).ok()
}

/// Returns the job that the unit file refuses if it is requested manually.
fn refusal(definition: Definition) -> Option<Refusal> {
    let has = |key| definition.value("Unit", key).is_some_and(is_true);
    if has("RefuseManualStop") { Some(Refusal::Stop) } else { has("RefuseManualStart").then_some(Refusal::Start) }
}

/// Returns the definitions of all active units that have one.
pub async fn definitions(manager: &Manager, files: &UnitFiles) -> Result<Definitions> {
    let units = manager.list().await?;
    let define = |unit: Unit| files.definition(&unit.name).map(|definition| (unit.name, definition));
    Ok(units.into_iter().filter(|unit| unit.is_active()).filter_map(define).collect())
}

/// Returns the names of all active units.
pub async fn active(manager: &Manager) -> Result<BTreeSet<String>> {
    Ok(manager.list().await?.into_iter().filter(|unit| unit.active == "active").map(|unit| unit.name).collect())
}

/// Returns the files below `/usr` that differ and that a service runs: the code of its processes, and the programs and
/// scripts of `ExecStart=`, which may have replaced themselves by other programs.
async fn code_of_service(manager: &Manager, unit: &Unit, sides: &Sides<'_>) -> Result<BTreeSet<String>> {
    let usr = Path::new("/usr");
    let mut changed = BTreeSet::new();
    let mut of_version = false;
    for pid in processes(&manager.control_group(unit).await?) {
        let code = code_of(pid, usr, sides.version, sides.differs);
        changed.extend(code.files);
        of_version |= code.of_version;
    }
    if of_version {
        for command in manager.commands(unit).await? {
            let script = command.first().and_then(|program| scripts::of(&command, program));
            let files = command.first().into_iter().chain(&script).flat_map(|path| scripts::below(path, usr));
            changed.extend(files.filter(|path| (sides.differs)(Path::new(path))));
        }
    }
    Ok(changed)
}

/// Inspects an active unit. Returns `None` if neither its code nor its definition differs.
async fn inspect(
    manager: &Manager,
    unit: &Unit,
    sides: &Sides<'_>,
    (active, present): (&BTreeSet<&str>, &BTreeSet<&str>),
    warnings: &mut Vec<String>,
) -> Result<Option<UnitState>> {
    let name = unit.name.as_str();
    let suffix = name.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    let changed = if suffix == "service" { code_of_service(manager, unit, sides).await? } else { BTreeSet::new() };
    let old = sides.old.get(name);
    let new = sides.new.definition(name);
    let difference = old.map_or(Difference::Same, |old| compare(Some(old), new.as_ref()));
    if changed.is_empty() && difference == Difference::Same {
        return Ok(None);
    }
    let links = manager.links(unit).await?;
    let none = Definition::default();
    let definition = new.as_ref().or(old).unwrap_or(&none);
    let mut kind = match suffix {
        "service" => Kind::Service(service(manager, definition, &links, active).await?),
        "socket" => {
            let triggers = links.triggers.iter().find(|unit| unit.ends_with(".service"));
            let serves = match triggers.filter(|service| active.contains(service.as_str())) {
                Some(service) => Some(socket_of(manager, name, service.clone(), active).await?),
                None => None,
            };
            let others = serves.iter().flat_map(|serves| &serves.others).map(String::as_str);
            Kind::Socket { listens: listens(sides, others.chain([name])), serves }
        }
        "mount" => Kind::Mount,
        _ => Kind::Trigger,
    };
    if let Kind::Service(service) = &mut kind
        && name == LOGIND
        && is_other_release(&changed, sides.systemd)
    {
        service.role = Role::OutdatedLogind;
    }
    let mut state = UnitState {
        name: name.to_owned(),
        changed: changed.into_iter().collect(),
        difference,
        wish: wish(name, definition.value("Unit", KEY), warnings),
        kind,
        ..UnitState::default()
    };
    let both = || [Some(name), state.serves().map(|serves| serves.service.as_str())].into_iter().flatten();
    let refuses = both().filter_map(|name| refusal(sides.new.definition(name)?)).next();
    let dependents = dependents(manager, both(), present).await?;
    (state.refuses, state.dependents) = (refuses, dependents);
    Ok(Some(state))
}

/// Returns the facts about an active service.
async fn service(
    manager: &Manager,
    definition: &Definition,
    links: &Links,
    active: &BTreeSet<&str>,
) -> Result<Service> {
    let of = |key| definition.value("Service", key);
    let mut role = if of("Type") == Some("oneshot") { Role::Oneshot } else { Role::Daemon };
    for socket in sockets(links, active) {
        if manager.accepts(socket).await? {
            role = Role::Connection;
        }
    }
    let reloads = of("ExecReload").is_some() || of("Type") == Some("notify-reload");
    let reload = if reloads { Reload::Supported } else { Reload::Unsupported };
    let left_to = sockets(links, active).next().filter(|_| links.wanted_by.is_empty()).cloned();
    Ok(Service { role, reload, left_to })
}

/// Returns the messages that `sockets` receive, by their unit files.
fn listens<'a>(sides: &Sides<'_>, sockets: impl IntoIterator<Item = &'a str>) -> Listens {
    let definition = |name| sides.new.definition(name).or_else(|| sides.old.get(name).cloned());
    let mut definitions = sockets.into_iter().filter_map(definition);
    match definitions.any(|socket| socket.value("Socket", "ListenNetlink").is_some()) {
        true => Listens::Netlink,
        false => Listens::Others,
    }
}

/// Returns true if a changed library of systemd has another release than `new`. Another build of the same release does
/// not count.
fn is_other_release(changed: &BTreeSet<String>, new: Option<u32>) -> bool {
    changed.iter().filter_map(|path| release_of(Path::new(path))).any(|old| Some(old) != new)
}

/// Returns the active and failed services, sockets, timers and paths, with their unit files. Mounts are excluded: a mount
/// that has a unit file now may have been mounted without one.
pub async fn active_fragments(manager: &Manager) -> Result<Vec<(String, PathBuf)>> {
    const KINDS: [&str; 4] = [".service", ".socket", ".timer", ".path"];
    let mut fragments = Vec::new();
    for unit in manager.list().await? {
        let concerned = matches!(unit.active.as_str(), "active" | "reloading" | "activating" | "failed");
        if concerned && KINDS.iter().any(|suffix| unit.name.ends_with(suffix)) {
            let fragment = manager.fragment(&unit).await?;
            if fragment.is_absolute() {
                fragments.push((unit.name, fragment));
            }
        }
    }
    Ok(fragments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_requested_action_is_a_warning() {
        let mut warnings = Vec::new();
        assert_eq!(wish("a.socket", None, &mut warnings), None);
        assert_eq!(wish("a.socket", Some("never"), &mut warnings), Some(Wish::Never));
        assert_eq!(wish("a.socket", Some("restrat"), &mut warnings), None);
        assert_eq!(
            warnings,
            ["a.socket: X-NodeImagePivot: unknown action \"restrat\": expected reload, restart, never or stop"]
        );
    }

    #[test]
    fn another_release_of_systemd_is_recognised() {
        let of = |changed: &[&str], new| is_other_release(&changed.iter().map(|&path| path.into()).collect(), new);
        let library = "lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so";
        assert!(of(&["lib/systemd/systemd-logind", library], Some(257)));
        assert!(of(&[library], None), "unknown release");
        assert!(!of(&[library], Some(252)), "another build");
        assert!(!of(&["lib/systemd/systemd-logind"], Some(257)), "the library is the same file");
    }
}
