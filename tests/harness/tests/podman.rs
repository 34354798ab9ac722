//! Containers that podman of the bootimage has started go on under podman of the node image. The assisted flow, with a
//! real podman on a real systemd in a container with a composefs root. docs/contract.md has the line.
//! `make check-one NAME=podman`

use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{contains, nothing_failed, same};
use testbed::container::{Bed, Container, Network, Root, Setup};
use testbed::derived::derive_tree;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{configured_later, configured_now, node_files};
use testbed::scenarios;
use testbed::suite::{Scenario, Suite};
use testbed::table::Flow;

const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);
const UNITS: &str = "node-image-pull.service node-image-overlay.service";
const STORAGE: &str = "/var/lib/containers/storage";

/// Podman would raise the limits, and limit the number of processes. Not every machine that runs tests allows that.
const LIMITS: &str = "[containers]\npids_limit = 0\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n";

/// The program in the containers. It writes a line each time it works, and ends with status 7 on SIGTERM.
const APP: &str = "#!/bin/sh\ntrap 'echo asked to end; exit 7' TERM\necho begun\n\
                   while :; do echo >>/work; sleep 0.2; done\n";

/// An image in podman's storage, from programs of the bootimage.
const IMAGE: &str = r#"
    set -e
    mkdir -p /var/tmp/app/{usr/bin,proc,sys,dev,tmp,run,etc}
    cd /var/tmp/app
    for link in bin lib lib64; do ln -s usr/$link $link; done
    for program in sh sleep cat echo; do
        cp -L --parents /usr/bin/$program .
        for library in $(ldd /usr/bin/$program | grep -o '/lib[^ ]*'); do cp -L --parents /usr$library .; done
    done
    cp /etc/app usr/bin/app
    tar -c . | podman import --quiet - localhost/app
"#;

/// The containers: one on its own with a volume of /usr, one that removes itself when it ends, and one as bootstrap services
/// and the assisted installer's agent are run: below a service, privileged, with everything of the host.
const CONTAINERS: [&str; 3] = ["detached", "passing", "service"];
const SERVICE: &str = "[Service]\nSuccessExitStatus=7\nExecStart=/usr/bin/podman run --rm --name service --privileged \
                       --network=host --pid=host --volume=/:/host:rslave localhost/app app\n";

/// A volume that differs in the node image. Podman mounts an overlay on this directory of /usr.
const VOLUME: &str = "--volume=/usr/lib/base-tool:/data:O";

/// Runs a command below systemd's cgroups. The shell of the test bed enters from outside and is in none of them.
fn ask(guest: &dyn Guest, command: &str) -> Result<String> {
    guest.ask(&format!("systemd-run --quiet --wait --pipe -- {command}"))
}

/// Runs a command in a separate login. Below a service, podman would leave the monitor of a detached container in the
/// cgroup of the service, and it would end with the service.
fn login(guest: &dyn Guest, command: &str) -> Result<()> {
    let answer = guest.login(command)?;
    if answer.status == 0 { Ok(()) } else { bail!("{command}: exit status {}:\n{}", answer.status, answer.text) }
}

fn inspect(guest: &dyn Guest, container: &str, fields: &[&str]) -> Result<String> {
    let format: Vec<_> = fields.iter().map(|field| format!("{{{{.{field}}}}}")).collect();
    ask(guest, &format!("podman inspect --type container --format '{}' {container}", format.join(" ")))
}

/// Returns the process of a container and that of its monitor, with their start times: the kernel may reuse a number, but
/// not with the same time.
fn processes(guest: &dyn Guest, container: &str) -> Result<String> {
    let pids = inspect(guest, container, &["State.Pid", "State.ConmonPid"])?;
    let found =
        guest.ask(&format!("for pid in {pids}; do awk '{{print $1, $2, $22}}' /proc/$pid/stat || exit 1; done"))?;
    if found.lines().count() != 2 || !found.contains("(conmon)") {
        bail!("{container} has {pids:?}: {found}")
    }
    Ok(found)
}

/// Checks the version of the file that the container `detached` sees in its volume.
fn volume_is_of(guest: &dyn Guest, version: &str) -> Result<()> {
    same(ask(guest, "podman exec detached cat /data/data")?, format!("data of {version}"))
}

/// Counts the lines that the program in a container has written.
fn worked(guest: &dyn Guest, container: &str) -> Result<usize> {
    // The shell keeps empty lines; the last line end does not count.
    Ok(ask(guest, &format!("podman exec {container} cat /work && echo end"))?.lines().count())
}

/// Returns true if the monitor of a container runs the program that is installed now.
fn monitor_is_new(guest: &dyn Guest, container: &str) -> Result<bool> {
    runs(guest, &inspect(guest, container, &["State.ConmonPid"])?, "/usr/bin/conmon")
}

/// Returns true if process `pid` runs the file that is at `path` now.
fn runs(guest: &dyn Guest, pid: &str, path: &str) -> Result<bool> {
    let script = format!("cmp -s /proc/{pid}/exe {path}; case $? in 0) echo this;; 1) echo another;; *) exit 1;; esac");
    Ok(guest.ask(&script)? == "this")
}

/// A container that runs podman, and what its containers looked like before the pivot.
struct Podman {
    bed: Bed,
    processes: Vec<String>,
    service: String,
    lines: usize,
}

#[test]
fn containers_go_on_under_a_newer_podman() -> Result<()> {
    let mut suite = Suite::new("podman: containers of podman 4.3 in the assisted flow, which brings podman 5.4");
    let mut podman = Podman { bed: boot()?, processes: Vec::new(), service: String::new(), lines: 0 };
    suite.run(
        &mut podman,
        &scenarios![
            podman_4_3_runs_detached_containers_and_one_as_a_service,
            the_units_of_the_installer_become_active after podman_4_3_runs_detached_containers_and_one_as_a_service,
        ],
    );
    suite.run_after("the_units_of_the_installer_become_active", &mut podman, &kept());
    suite.run_after("the_units_of_the_installer_become_active", &mut podman, &under_the_new_podman());
    suite.run_after("the_units_of_the_installer_become_active", &mut podman, &at_the_end());
    suite.covers(&podman.bed.guest, Flow::Assisted, "containers_go_on_under_a_newer_podman");
    suite.finish()
}

/// Returns the scenarios about containers of the old podman right after the switch.
fn kept() -> [Scenario<Podman>; 5] {
    scenarios![
        podman_runc_and_conmon_are_those_of_the_node_image,
        the_service_of_a_container_is_the_same_invocation_of_the_old_podman,
        containers_keep_their_processes_and_the_old_monitors,
        containers_go_on_working,
        a_volume_of_usr_shows_the_old_usr_while_its_container_runs,
    ]
}

/// Returns the scenarios about the new podman with containers and images of the old one.
fn under_the_new_podman() -> [Scenario<Podman>; 6] {
    scenarios![
        the_new_podman_lists_the_containers_as_running,
        the_new_podman_starts_programs_in_the_containers,
        a_container_with_the_root_of_the_host_sees_the_new_usr,
        the_new_podman_has_the_logs,
        a_new_container_starts_from_the_old_image_with_the_new_monitor,
        a_new_container_writes_to_a_volume_of_the_new_usr,
    ]
}

/// Returns the scenarios in which containers of the old podman end.
fn at_the_end() -> [Scenario<Podman>; 5] {
    scenarios![
        the_old_monitor_of_a_container_that_ends_calls_the_new_podman_to_remove_it,
        podman_stop_ends_an_old_container_and_has_its_last_words_and_exit_status,
        a_stopped_container_starts_again_with_the_new_monitor_and_can_be_removed,
        systemctl_stop_ends_the_service_and_its_container,
        no_unit_has_failed,
    ]
}

fn boot() -> Result<Bed> {
    let images = Images::ensure()?;
    let (boot, layer) = images.podman()?;
    let network = Network::new()?;
    let work = work_dir("podman-registry")?;
    let (storage, image) = derive_tree(images, "node-a", &work, &layer)?;
    let registry = Registry::start(&storage, &work, Some(network.pid()), None)?;
    let setup = Setup { root: Root::Composefs, ..Setup::live("podman", &boot) };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &image.by_digest(), "127.0.0.1", registry.port)?;
        files.put("/etc/containers/containers.conf.d/50-testbed.conf", 0o644, LIMITS)?;
        files.put("/etc/app", 0o755, APP)?;
        files.put("/etc/systemd/system/app.service", 0o644, SERVICE)?;
        configured_later(files)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    Ok(Bed { guest, registry, network })
}

const SHOW_SERVICE: &str = "systemctl show -p MainPID -p InvocationID -p ActiveState -p NRestarts app.service";

fn podman_4_3_runs_detached_containers_and_one_as_a_service(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    contains(&guest.ask("podman --version")?, "version 4.3.")?;
    guest.ask(IMAGE)?;
    login(guest, &format!("podman run --detach --name detached --network=none {VOLUME} localhost/app app"))?;
    login(guest, "podman run --detach --rm --name passing --network=none localhost/app app")?;
    guest.ask("systemctl start app.service")?;
    wait_for("all to work", SOON, || CONTAINERS.iter().try_fold(true, |all, one| Ok(all && worked(guest, one)? > 1)))?;
    CONTAINERS.iter().try_for_each(|one| same(monitor_is_new(guest, one)?, true))?;
    volume_is_of(guest, "1.0")?;
    podman.processes = CONTAINERS.iter().map(|one| processes(guest, one)).collect::<Result<_>>()?;
    podman.service = guest.ask(SHOW_SERVICE)?;
    podman.lines = worked(guest, "detached")?;
    Ok(())
}

fn the_units_of_the_installer_become_active(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    configured_now(guest)?;
    guest.ask(&format!("systemctl start --no-block {UNITS}"))?;
    guest.wait_unit("node-image-overlay.service", "active", PIVOT)
}

fn podman_runc_and_conmon_are_those_of_the_node_image(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    contains(&guest.ask("podman --version")?, "version 5.4.")?;
    contains(&guest.ask("runc --version")?, "version 1.1.15")?;
    contains(&guest.ask("conmon --version")?, "version 2.1.12")
}

fn the_service_of_a_container_is_the_same_invocation_of_the_old_podman(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    same(guest.ask(SHOW_SERVICE)?, podman.service.clone())?;
    same(runs(guest, &guest.unit("app.service", "MainPID")?, "/usr/bin/podman")?, false)
}

fn containers_keep_their_processes_and_the_old_monitors(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    for (one, before) in CONTAINERS.iter().zip(&podman.processes) {
        same(&processes(guest, one)?, before)?;
        same(monitor_is_new(guest, one)?, false)?;
    }
    Ok(())
}

fn containers_go_on_working(podman: &mut Podman) -> Result<()> {
    let (before, now) = (podman.lines, worked(&podman.bed.guest, "detached")?);
    if now > before { Ok(()) } else { bail!("{before} lines before, {now} after") }
}

fn a_volume_of_usr_shows_the_old_usr_while_its_container_runs(podman: &mut Podman) -> Result<()> {
    volume_is_of(&podman.bed.guest, "1.0")
}

fn the_new_podman_lists_the_containers_as_running(podman: &mut Podman) -> Result<()> {
    let list = ask(&podman.bed.guest, "podman ps --sort names --format '{{.Names}} {{.State}}'")?;
    same(list, CONTAINERS.map(|one| format!("{one} running")).join("\n"))
}

fn the_new_podman_starts_programs_in_the_containers(podman: &mut Podman) -> Result<()> {
    for one in CONTAINERS {
        same(ask(&podman.bed.guest, &format!("podman exec {one} echo alive"))?, "alive".into())?;
    }
    Ok(())
}

fn a_container_with_the_root_of_the_host_sees_the_new_usr(podman: &mut Podman) -> Result<()> {
    let release = ask(&podman.bed.guest, "podman exec service cat /host/usr/lib/os-release")?;
    contains(&release, "Debian GNU/Linux 13")
}

fn the_new_podman_has_the_logs(podman: &mut Podman) -> Result<()> {
    contains(&ask(&podman.bed.guest, "podman logs detached")?, "begun")
}

fn a_new_container_starts_from_the_old_image_with_the_new_monitor(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    same(ask(guest, "podman run --rm --network=none localhost/app echo new")?, "new".into())?;
    login(guest, "podman run --detach --name new --network=none localhost/app app")?;
    same(monitor_is_new(guest, "new")?, true)?;
    ask(guest, "podman rm --force --time 20 new").map(drop)
}

fn a_new_container_writes_to_a_volume_of_the_new_usr(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    let run = format!("run --rm --network=none {VOLUME} localhost/app");
    let write = "sh -c 'echo written >/data/new && cat /data/new /data/data'";
    same(ask(guest, &format!("podman {run} {write}"))?, "written\ndata of 2.0".into())?;
    guest.ask("test ! -e /usr/lib/base-tool/new").map(drop)
}

fn the_old_monitor_of_a_container_that_ends_calls_the_new_podman_to_remove_it(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    let ids = inspect(guest, "passing", &["Id", "State.Pid"])?;
    let Some((id, pid)) = ids.split_once(' ') else { bail!("{ids}") };
    let storage = format!("test -d {STORAGE}/overlay-containers/{id}");
    guest.ask(&format!("{storage} && kill {pid}"))?;
    // A call of podman would notice the end by itself, so the wait looks at its storage only.
    wait_for("its storage to be gone", SOON, || Ok(guest.run(&storage)?.status == 1))
}

fn podman_stop_ends_an_old_container_and_has_its_last_words_and_exit_status(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    ask(guest, "podman stop --time 20 detached")?;
    same(inspect(guest, "detached", &["State.Status", "State.ExitCode"])?, "exited 7".into())?;
    // The journal has them a moment later.
    wait_for("the last words", SOON, || Ok(ask(guest, "podman logs detached")?.contains("asked to end")))
}

fn a_stopped_container_starts_again_with_the_new_monitor_and_can_be_removed(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    login(guest, "podman start detached")?;
    same(monitor_is_new(guest, "detached")?, true)?;
    volume_is_of(guest, "2.0")?;
    ask(guest, "podman rm --force --time 20 detached").map(drop)
}

fn systemctl_stop_ends_the_service_and_its_container(podman: &mut Podman) -> Result<()> {
    let guest = &podman.bed.guest;
    guest.ask("systemctl stop app.service")?;
    same(guest.unit("app.service", "Result")?, "success".into())?;
    wait_for("no container", SOON, || Ok(ask(guest, "podman ps --all --quiet")?.is_empty()))
}

fn no_unit_has_failed(podman: &mut Podman) -> Result<()> {
    nothing_failed(&podman.bed.guest)
}
