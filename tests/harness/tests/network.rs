//! The network stays up: NetworkManager with a static address and one from DHCP, dbus-broker, polkit and chrony on a real
//! systemd in a container, in the bootstrap flow and, after an undo, in the assisted flow. `make check-one NAME=network`

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Setup};
use testbed::derived::derive_tree;
use testbed::files::Files;
use testbed::guest::{Guest, ssh};
use testbed::images::{Images, work_dir};
use testbed::proc::{bound, end, log_to, succeed, wait_for};
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
const LEASED: &str = "[connection]\nid=leased\nuuid=0f1c0a52-6d0b-4c53-9b0e-5e0f4b1f7d22\ntype=ethernet\n\
                      interface-name=eth1\n[ipv4]\nmethod=auto\n[ipv6]\nmethod=disabled\n";
/// The server gives out one address, for an hour, and asks for a renewal each five seconds.
const DHCP: [&str; 10] = [
    "--keep-in-foreground",
    "--conf-file=/dev/null",
    "--port=0",
    "--no-ping",
    "--user=root",
    "--interface=lease",
    "--dhcp-range=203.0.113.10,203.0.113.10,1h",
    "--dhcp-option=option:T1,5",
    "--dhcp-option=option:dns-server,203.0.113.1",
    "--log-facility=-",
];
/// Writes a line for each event of an interface.
const DISPATCHER: &str = "#!/bin/sh\necho \"$1 $2\" >>/run/dispatched\n";
/// Without the rest of the lease's time.
const ADDRESSES: &str = "(ip -o address show dev eth0; ip -o address show dev eth1) | sed 's/valid_lft.*//'; ip route; \
                         cat /etc/resolv.conf";
/// The machine's addresses: a static one and that of the lease.
const OWN: [&str; 2] = ["192.0.2.2", "203.0.113.10"];
const DISPATCHED: &str = "grep -cE '^eth[01] up$' /run/dispatched";
/// Units that run the bootimage's code until the next boot.
const KEPT: [&str; 2] = ["NetworkManager.service", "dbus-broker.service"];
/// Those in the assisted flow, which restarts neither the clock nor polkit.
const KEPT_IN_USE: [&str; 4] = ["NetworkManager.service", "dbus-broker.service", CLOCK, "polkit.service"];
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
    /// Serves DHCP at the other end, and logs to `leases`.
    server: Child,
    leases: PathBuf,
    /// An ssh session from the other end to each address: TCP connections that stay open.
    sessions: Vec<Child>,
    addresses: String,
    /// Number of events that the dispatcher has seen.
    dispatched: String,
    /// Number of requests for a new lease.
    discoveries: usize,
    processes: Vec<(&'static str, String)>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        end(&mut self.monitor);
        end(&mut self.server);
        self.sessions.iter_mut().for_each(end);
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

    /// Records the network and the processes.
    fn record(&mut self) -> Result<()> {
        self.addresses = self.bed.guest.ask(ADDRESSES)?;
        self.dispatched = self.bed.guest.ask(DISPATCHED)?;
        self.discoveries = self.messages("DHCPDISCOVER")?;
        self.processes = KEPT_IN_USE.into_iter().map(|unit| Ok((unit, self.pid(unit)?))).collect::<Result<_>>()?;
        Ok(fs::write(&self.changes, "")?)
    }

    /// Counts the messages of a kind between the machine and the DHCP server.
    fn messages(&self, kind: &str) -> Result<usize> {
        Ok(fs::read_to_string(&self.leases)?.matches(&format!(" {kind}(lease) ")).count())
    }

    /// Checks that units have the same processes as before, and that status lists them.
    fn are_kept(&self, units: &[&str]) -> Result<()> {
        units.iter().try_for_each(|unit| same(self.pid(unit)?.as_str(), self.before(unit)?))?;
        let status = self.bed.guest.status()?;
        let stale = status["still_old"].as_array().context("no still_old")?;
        match units.iter().find(|unit| !stale.iter().any(|one| one["unit"] == **unit)) {
            Some(unit) => bail!("no {unit} in {stale:#?}"),
            None => Ok(()),
        }
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
    files.put("/etc/NetworkManager/system-connections/leased.nmconnection", 0o600, LEASED)?;
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
    ip(&network, &format!("link add eth1 type veth peer name lease netns {}", peer.pid()))?;
    for (address, end) in [("192.0.2.1/24", "uplink"), ("203.0.113.1/24", "lease")] {
        ip(&peer, &format!("address add {address} dev {end}"))?;
        ip(&peer, &format!("link set {end} up"))?;
    }
    let work = work_dir("network-registry")?;
    let (changes, leases) = (work.join("changes"), work.join("leases"));
    let server = serve_dhcp(&peer, &work, &leases)?;
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
    Ok(Connected {
        bed: Bed { guest, registry, network },
        peer,
        monitor,
        changes,
        server,
        leases,
        sessions: Vec::new(),
        addresses: String::new(),
        dispatched: String::new(),
        discoveries: 0,
        processes: Vec::new(),
    })
}

fn serve_dhcp(peer: &Network, work: &Path, log: &Path) -> Result<Child> {
    let mut server = within(peer, "dnsmasq");
    server.args(DHCP).arg(format!("--dhcp-leasefile={}", work.join("given").display()));
    server.arg(format!("--pid-file={}", work.join("pid").display()));
    log_to(&mut server, log)?;
    server.spawn().context("cannot start dnsmasq")
}

#[test]
fn the_network_stays_up_over_the_switch_and_the_isolate() -> Result<()> {
    let mut suite = Suite::new("network: NetworkManager with DHCP, dbus-broker, polkit and chrony, both flows");
    let mut connected = boot()?;
    suite.run(
        &mut connected,
        &scenarios![
            network_manager_has_configured_the_interfaces,
            ssh_sessions_from_the_other_end_are_open after network_manager_has_configured_the_interfaces,
            the_machine_becomes_its_node_image after ssh_sessions_from_the_other_end_are_open,
        ],
    );
    suite.run_after("the_machine_becomes_its_node_image", &mut connected, &connections());
    suite.run_after("the_machine_becomes_its_node_image", &mut connected, &afterwards());
    let name = "the_network_stays_up_over_the_switch_and_the_isolate";
    suite.covers(&connected.bed.guest, Flow::Bootstrap, name);
    suite.part("assisted flow");
    suite.run(
        &mut connected,
        &scenarios![
            an_undo_keeps_the_network after the_machine_becomes_its_node_image,
            ssh_sessions_from_the_other_end_are_open after an_undo_keeps_the_network,
            units_that_an_installer_starts_become_active after ssh_sessions_from_the_other_end_are_open,
        ],
    );
    suite.run_after("units_that_an_installer_starts_become_active", &mut connected, &connections());
    let services = scenarios![the_switch_restarts_no_service, no_unit_has_failed];
    suite.run_after("units_that_an_installer_starts_become_active", &mut connected, &services);
    suite.covers(&connected.bed.guest, Flow::Assisted, name);
    suite.finish()
}

/// Returns the scenarios about the network of a machine that was switched.
fn connections() -> [Scenario<Connected>; 5] {
    scenarios![
        addresses_routes_and_resolv_conf_are_unchanged,
        the_lease_is_renewed_and_was_never_lost,
        no_address_or_route_was_removed_meanwhile,
        the_ssh_sessions_continue,
        the_dispatcher_has_not_run_again,
    ]
}

/// Returns the scenarios about the services of the machine that has become its node image.
fn afterwards() -> [Scenario<Connected>; 6] {
    scenarios![
        network_manager_and_the_bus_are_the_same_processes_and_listed,
        chrony_runs_the_code_of_the_node_image,
        the_old_bus_starts_the_polkit_of_the_node_image,
        the_next_event_reaches_the_dispatcher_over_the_old_bus,
        the_bundle_has_the_certificates_of_the_node_image_and_the_private_one,
        no_unit_has_failed,
    ]
}

fn network_manager_has_configured_the_interfaces(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    wait_for("the dispatcher", SOON, || Ok(guest.run(DISPATCHED)?.text.trim() == "2"))?;
    contains(&guest.ask("readlink -f /proc/$(systemctl show -p MainPID --value dbus.service)/exe")?, "dbus-broker")?;
    guest.ask(&format!("busctl call {POLKIT} && systemctl start {CLOCK}"))?;
    guest.ask("update-ca-certificates")?;
    connected.record()?;
    for expected in [
        "192.0.2.2/24",
        "198.51.100.0/24 via 192.0.2.1",
        "nameserver 192.0.2.1",
        "203.0.113.10/24",
        "default via 203.0.113.1",
        "nameserver 203.0.113.1",
    ] {
        contains(&connected.addresses, expected)?;
    }
    Ok(())
}

fn ssh_sessions_from_the_other_end_are_open(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    guest.ask("rm -f /run/session-* /run/switched")?;
    guest.wait_unit("ssh.service", "active", SOON)?;
    let ssh = ssh(&Images::ensure()?.tools.ssh_key);
    for address in OWN {
        let mut session = within(&connected.peer, "ssh");
        session.args(ssh.get_args()).arg(format!("root@{address}"));
        session
            .arg(format!("touch /run/session-{address}; until test -e /run/switched; do sleep 0.2; done; base-tool"));
        connected.sessions.push(session.stdout(Stdio::piped()).spawn()?);
    }
    wait_for("the sessions", SOON, || Ok(guest.ask("ls /run | grep -c ^session-")? == OWN.len().to_string()))
}

fn the_machine_becomes_its_node_image(connected: &mut Connected) -> Result<()> {
    connected.bed.registry.resume()?;
    wait_pivoted(&connected.bed.guest, PIVOT)
}

fn an_undo_keeps_the_network(connected: &mut Connected) -> Result<()> {
    // The latest event removed and added an address.
    connected.record()?;
    let guest = &connected.bed.guest;
    guest.ask("node-image-pivot undo")?;
    same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
    addresses_routes_and_resolv_conf_are_unchanged(connected)?;
    no_address_or_route_was_removed_meanwhile(connected)?;
    nothing_failed(&connected.bed.guest)?;
    connected.record()
}

/// The units of the phases stay active over an undo.
fn units_that_an_installer_starts_become_active(connected: &mut Connected) -> Result<()> {
    let guest = &connected.bed.guest;
    guest.ask("systemctl stop node-image-finish.service node-image-overlay.service node-image-pull.service")?;
    guest.ask("systemctl start --no-block node-image-pull.service node-image-overlay.service")?;
    guest.wait_unit("node-image-overlay.service", "active", PIVOT)?;
    same(guest.ask("base-tool")?, "base-tool 2.0".into())
}

fn addresses_routes_and_resolv_conf_are_unchanged(connected: &mut Connected) -> Result<()> {
    same(connected.bed.guest.ask(ADDRESSES)?, connected.addresses.clone())
}

/// The next renewal comes from the process that got the lease, which asks for a new one only without a lease.
fn the_lease_is_renewed_and_was_never_lost(connected: &mut Connected) -> Result<()> {
    let before = connected.messages("DHCPACK")?;
    wait_for("the next renewal", SOON, || Ok(connected.messages("DHCPACK")? > before))?;
    same(connected.messages("DHCPDISCOVER")?, connected.discoveries)
}

fn no_address_or_route_was_removed_meanwhile(connected: &mut Connected) -> Result<()> {
    same(connected.monitor.try_wait()?, None)?;
    let changes = fs::read_to_string(&connected.changes)?;
    if changes.contains("Deleted") { bail!("{changes}") } else { Ok(()) }
}

fn the_ssh_sessions_continue(connected: &mut Connected) -> Result<()> {
    connected.bed.guest.ask("touch /run/switched")?;
    same(connected.sessions.len(), OWN.len())?;
    for session in connected.sessions.drain(..) {
        same(String::from_utf8(session.wait_with_output()?.stdout)?, "base-tool 2.0\n".into())?;
    }
    Ok(())
}

fn the_dispatcher_has_not_run_again(connected: &mut Connected) -> Result<()> {
    same(connected.bed.guest.ask(DISPATCHED)?, connected.dispatched.clone())
}

fn network_manager_and_the_bus_are_the_same_processes_and_listed(connected: &mut Connected) -> Result<()> {
    connected.are_kept(&KEPT)
}

fn the_switch_restarts_no_service(connected: &mut Connected) -> Result<()> {
    connected.are_kept(&KEPT_IN_USE)
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
    wait_for("the second run", SOON, || Ok(guest.ask(DISPATCHED)? == "3"))
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
