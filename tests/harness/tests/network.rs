//! The network stays up: NetworkManager with a static address, dbus-broker, polkit and chrony on a real systemd in a
//! container, in the bootstrap flow. `make check-one NAME=network`

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Setup};
use testbed::derived::derive_tree;
use testbed::files::Files;
use testbed::guest::{Guest, ssh};
use testbed::images::{Images, work_dir};
use testbed::proc::{bound, end, succeed, wait_for};
use testbed::registry::Registry;
use testbed::scenario::{node_files, wait_pivoted};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::table::Flow;

const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);

const CONNECTION: &str = "[connection]\nid=cable\nuuid=6a0c7a3e-4d5e-4c0e-9d5e-0d1f5b1b7c11\ntype=ethernet\n\
                          interface-name=eth0\n[ipv4]\nmethod=manual\naddress1=192.0.2.2/24,192.0.2.1\n\
                          route1=198.51.100.0/24,192.0.2.1\ndns=192.0.2.1;\ndns-search=example.test;\n\
                          [ipv6]\nmethod=disabled\n";
/// Writes a line for each event of an interface.
const DISPATCHER: &str = "#!/bin/sh\necho \"$1 $2\" >>/run/dispatched\n";
const ADDRESSES: &str = "ip -o address show dev eth0; ip route; cat /etc/resolv.conf";
const DISPATCHED: &str = "grep -c '^eth0 up$' /run/dispatched";
/// Units that run the bootimage's code until the next boot.
const KEPT: [&str; 2] = ["NetworkManager.service", "dbus-broker.service"];
/// Counts the certificates in the bundle, and those that the system is configured to trust with the machine's own one.
const CERTIFICATES: &str = "echo $(grep -c BEGIN /etc/ssl/certs/ca-certificates.crt) \
                            $(($(grep -c '^[^#!]' /etc/ca-certificates.conf) + 1))";
const CLOCK: &str = "chrony.service";
const POLKIT: &str = "org.freedesktop.PolicyKit1 /org/freedesktop/PolicyKit1/Authority org.freedesktop.DBus.Peer Ping";

/// A machine whose network is at the other end of a cable.
struct Connected {
    bed: Bed,
    /// The network at the other end.
    peer: Network,
    /// Writes changes of addresses and routes to `changes`.
    monitor: Child,
    changes: PathBuf,
    /// An ssh session from the other end: a TCP connection that stays open.
    session: Option<Child>,
    addresses: String,
    processes: Vec<(&'static str, String)>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        end(&mut self.monitor);
        self.session.iter_mut().for_each(end);
    }
}

impl Connected {
    fn pid(&self, unit: &str) -> Result<String> {
        match self.bed.guest.unit(unit, "MainPID")?.as_str() {
            "0" => bail!("{unit} does not run"),
            pid => Ok(pid.to_owned()),
        }
    }

    fn runs_new_code(&self, unit: &str) -> Result<()> {
        let pid = self.pid(unit)?;
        self.bed.guest.ask(&format!("cmp /proc/{pid}/exe $(readlink /proc/{pid}/exe)")).map(drop)
    }

    fn before(&self, unit: &str) -> Result<&str> {
        let found = self.processes.iter().find(|(one, _)| *one == unit);
        found.map(|(_, pid)| pid.as_str()).with_context(|| format!("{unit} did not run before"))
    }
}

/// Returns a command in the namespace of a network.
fn within(network: &Network, program: &str) -> Command {
    let mut command = bound("nsenter");
    command.arg(format!("--net=/proc/{}/ns/net", network.pid())).arg("--").arg(program);
    command
}

fn mask(files: &Files, unit: &str) -> Result<()> {
    let units = files.root().join("etc/systemd/system");
    fs::create_dir_all(&units)?;
    Ok(symlink("/dev/null", units.join(unit))?)
}

/// Makes the certificate of a private authority.
fn private_certificate() -> Result<String> {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3650"]);
    openssl.args(["-subj", "/CN=private.example.test", "-keyout", "/dev/null"]);
    Ok(String::from_utf8(succeed(&mut openssl)?.stdout)?)
}

fn network_files(files: &Files) -> Result<()> {
    for unit in ["networkd.service", "networkd.socket", "networkd-wait-online.service", "resolved.service"] {
        mask(files, &format!("systemd-{unit}"))?;
    }
    files.put("/etc/NetworkManager/system-connections/cable.nmconnection", 0o600, CONNECTION)?;
    files.put("/var/usrlocal/share/ca-certificates/private.crt", 0o644, &private_certificate()?)?;
    files.put("/etc/NetworkManager/conf.d/10-dns.conf", 0o644, "[main]\ndns=default\nrc-manager=symlink\n")?;
    files.put("/etc/NetworkManager/dispatcher.d/10-count", 0o755, DISPATCHER)?;
    Ok(symlink("../run/NetworkManager/resolv.conf", files.root().join("etc/resolv.conf"))?)
}

fn boot() -> Result<Connected> {
    let images = Images::ensure()?;
    let (boot, layer) = images.network()?;
    let (network, peer) = (Network::new()?, Network::new()?);
    let ip = |network: &Network, line: &str| succeed(within(network, "ip").args(line.split(' ')));
    ip(&network, &format!("link set cable name uplink netns {}", peer.pid()))?;
    ip(&peer, "address add 192.0.2.1/24 dev uplink")?;
    ip(&peer, "link set uplink up")?;
    let work = work_dir("network-registry")?;
    let changes = work.join("changes");
    let monitor =
        within(&network, "ip").args(["monitor", "address", "route"]).stdout(File::create(&changes)?).spawn()?;
    let (storage, image) = derive_tree(images, "node-a", &work, &layer)?;
    let mut registry = Registry::start(&storage, &work, Some(network.pid()), None)?;
    registry.stop();
    let setup = Setup::live("network", &boot);
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &image.by_digest(), "127.0.0.1", registry.port)?;
        network_files(files)
    })?;
    let bed = Bed { guest, registry, network };
    Ok(Connected { bed, peer, monitor, changes, session: None, addresses: String::new(), processes: Vec::new() })
}

#[test]
fn the_network_stays_up_over_the_switch_and_the_isolate() -> Result<()> {
    let mut suite = Suite::new("network: NetworkManager, dbus-broker, polkit and chrony, bootstrap flow");
    let mut connected = boot()?;
    suite.run(
        &mut connected,
        &scenarios![
            network_manager_has_configured_the_interface,
            an_ssh_session_from_the_other_end_is_open after network_manager_has_configured_the_interface,
            the_machine_becomes_its_node_image after an_ssh_session_from_the_other_end_is_open,
        ],
    );
    suite.run_after("the_machine_becomes_its_node_image", &mut connected, &afterwards());
    suite.covers(&connected.bed.guest, Flow::Bootstrap, "the_network_stays_up_over_the_switch_and_the_isolate");
    suite.finish()
}

/// Returns the scenarios about the machine that has become its node image.
fn afterwards() -> [Scenario<Connected>; 11] {
    scenarios![
        addresses_routes_and_resolv_conf_are_unchanged,
        no_address_or_route_was_removed_meanwhile,
        the_ssh_session_continues,
        the_dispatcher_has_not_run_again,
        network_manager_and_the_bus_are_the_same_processes,
        status_lists_them_as_units_that_run_old_code,
        chrony_runs_the_code_of_the_node_image,
        the_old_bus_starts_the_polkit_of_the_node_image,
        the_next_event_reaches_the_dispatcher_over_the_old_bus,
        the_bundle_has_the_certificates_of_the_node_image_and_the_private_one,
        no_unit_has_failed,
    ]
}

fn network_manager_has_configured_the_interface(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    wait_for("the dispatcher", SOON, || Ok(guest.run(DISPATCHED)?.status == 0))?;
    contains(&guest.ask("readlink -f /proc/$(systemctl show -p MainPID --value dbus.service)/exe")?, "dbus-broker")?;
    guest.ask(&format!("busctl call {POLKIT} && systemctl start {CLOCK}"))?;
    guest.ask("update-ca-certificates")?;
    connected.addresses = guest.ask(ADDRESSES)?;
    for expected in ["192.0.2.2/24", "198.51.100.0/24 via 192.0.2.1", "nameserver 192.0.2.1"] {
        contains(&connected.addresses, expected)?;
    }
    let units = KEPT.into_iter().chain([CLOCK]);
    connected.processes = units.map(|unit| Ok((unit, connected.pid(unit)?))).collect::<Result<_>>()?;
    Ok(())
}

fn an_ssh_session_from_the_other_end_is_open(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    let ssh = ssh(&Images::ensure()?.tools.ssh_key);
    let mut session = within(&connected.peer, "ssh");
    session.args(ssh.get_args()).arg("root@192.0.2.2");
    session.arg("touch /run/session; until test -e /run/switched; do sleep 0.2; done; base-tool");
    guest.wait_unit("ssh.service", "active", SOON)?;
    connected.session = Some(session.stdout(Stdio::piped()).spawn()?);
    wait_for("the session", SOON, || Ok(guest.run("test -e /run/session")?.status == 0))
}

fn the_machine_becomes_its_node_image(connected: &mut Connected) -> Result<()> {
    fs::write(&connected.changes, "")?;
    connected.bed.registry.resume()?;
    wait_pivoted(&connected.bed.guest, PIVOT)
}

fn addresses_routes_and_resolv_conf_are_unchanged(connected: &mut Connected) -> Result<()> {
    same(connected.bed.guest.ask(ADDRESSES)?, connected.addresses.clone())
}

fn no_address_or_route_was_removed_meanwhile(connected: &mut Connected) -> Result<()> {
    same(connected.monitor.try_wait()?, None)?;
    let changes = fs::read_to_string(&connected.changes)?;
    if changes.contains("Deleted") { bail!("{changes}") } else { Ok(()) }
}

fn the_ssh_session_continues(connected: &mut Connected) -> Result<()> {
    let session = connected.session.take().context("the session was not opened")?;
    connected.bed.guest.ask("touch /run/switched")?;
    same(String::from_utf8(session.wait_with_output()?.stdout)?, "base-tool 2.0\n".into())
}

fn the_dispatcher_has_not_run_again(connected: &mut Connected) -> Result<()> {
    same(connected.bed.guest.ask(DISPATCHED)?, "1".into())
}

fn network_manager_and_the_bus_are_the_same_processes(connected: &mut Connected) -> Result<()> {
    KEPT.iter().try_for_each(|unit| same(connected.pid(unit)?.as_str(), connected.before(unit)?))
}

fn status_lists_them_as_units_that_run_old_code(connected: &mut Connected) -> Result<()> {
    let status = connected.bed.guest.status()?;
    let stale = status["still_old"].as_array().context("no still_old")?;
    for unit in KEPT {
        if !stale.iter().any(|one| one["unit"] == unit) {
            bail!("no {unit} in {stale:#?}")
        }
    }
    Ok(())
}

fn chrony_runs_the_code_of_the_node_image(connected: &mut Connected) -> Result<()> {
    if connected.pid(CLOCK)? == connected.before(CLOCK)? {
        bail!("the same process")
    }
    connected.runs_new_code(CLOCK)
}

fn the_old_bus_starts_the_polkit_of_the_node_image(connected: &mut Connected) -> Result<()> {
    connected.bed.guest.ask(&format!("busctl call {POLKIT}"))?;
    connected.runs_new_code("polkit.service")
}

fn the_next_event_reaches_the_dispatcher_over_the_old_bus(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    guest.ask("nmcli connection up cable")?;
    wait_for("the second run", SOON, || Ok(guest.ask(DISPATCHED)? == "2"))
}

fn the_bundle_has_the_certificates_of_the_node_image_and_the_private_one(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    let counts = guest.ask(CERTIFICATES)?;
    let (bundle, expected) = counts.split_once(' ').with_context(|| counts.clone())?;
    same(bundle, expected)?;
    guest.ask("cmp /etc/ca-certificates.conf /usr/etc/ca-certificates.conf")?;
    let private = "sed -n 2p /usr/local/share/ca-certificates/private.crt";
    guest.ask(&format!("grep -qF \"$({private})\" /etc/ssl/certs/ca-certificates.crt")).map(drop)
}

fn no_unit_has_failed(connected: &mut Connected) -> Result<()> {
    nothing_failed(&connected.bed.guest)
}
