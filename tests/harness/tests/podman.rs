//! What podman of the bootimage has started goes on under podman of the node image: the assisted flow, with a real
//! podman on a real systemd in a container. docs/contract.md has the line.
//! `cargo test -p testbed --test podman -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::container::{Container, Network, Setup};
use testbed::derived::derive_tree;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::node_files;

const PIVOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);
const UNITS: &str = "node-image-pull.service node-image-overlay.service";
const STORAGE: &str = "/var/lib/containers/storage";

/// Podman would raise them, and limit the number of processes: not every machine that runs tests lets a container.
const LIMITS: &str = "[containers]\npids_limit = 0\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n";

/// The program in the containers: works, a line each time, and ends in a way of its own when it is told to.
const APP: &str = "#!/bin/sh\ntrap 'echo told to end; exit 7' TERM\necho begun\n\
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

/// The containers: one on its own, one that removes itself when it ends, and one as bootstrap services and the assisted
/// installer's agent are run: below a service, privileged, with everything of the host.
const CONTAINERS: [&str; 3] = ["detached", "passing", "service"];
const SERVICE: &str = "[Service]\nSuccessExitStatus=7\nExecStart=/usr/bin/podman run --rm --name service --privileged \
                       --network=host --pid=host --volume=/:/host:rslave localhost/app app\n";

/// A command below systemd's cgroups: a shell that was brought in from outside is in none of them.
fn ask(guest: &dyn Guest, command: &str) -> Result<String> {
    guest.ask(&format!("systemd-run --quiet --wait --pipe -- {command}"))
}

/// A command in a login of its own. Below a service, podman would leave the monitor of a detached container in the
/// service's cgroup, and it would end with it.
fn login(guest: &dyn Guest, command: &str) -> Result<()> {
    let answer = guest.login(command)?;
    if answer.status == 0 { Ok(()) } else { bail!("{command}: exit status {}:\n{}", answer.status, answer.text) }
}

fn inspect(guest: &dyn Guest, container: &str, fields: &[&str]) -> Result<String> {
    let format: Vec<_> = fields.iter().map(|field| format!("{{{{.{field}}}}}")).collect();
    ask(guest, &format!("podman inspect --type container --format '{}' {container}", format.join(" ")))
}

/// A container's process and its monitor's, with when they started: a number may come again, the pair does not.
fn processes(guest: &dyn Guest, container: &str) -> Result<String> {
    let pids = inspect(guest, container, &["State.Pid", "State.ConmonPid"])?;
    let found =
        guest.ask(&format!("for pid in {pids}; do awk '{{print $1, $2, $22}}' /proc/$pid/stat || exit 1; done"))?;
    if found.lines().count() != 2 || !found.contains("(conmon)") {
        bail!("{container} has {pids:?}: {found}")
    }
    Ok(found)
}

fn worked(guest: &dyn Guest, container: &str) -> Result<usize> {
    // The shell keeps empty lines; the last line end does not count.
    Ok(ask(guest, &format!("podman exec {container} cat /work && echo end"))?.lines().count())
}

/// Whether the monitor of a container is the one that is installed now.
fn monitor_is_new(guest: &dyn Guest, container: &str) -> Result<bool> {
    runs(guest, &inspect(guest, container, &["State.ConmonPid"])?, "/usr/bin/conmon")
}

/// Whether what runs as `pid` is the file that is at `path` now.
fn runs(guest: &dyn Guest, pid: &str, path: &str) -> Result<bool> {
    let script = format!("cmp -s /proc/{pid}/exe {path}; case $? in 0) echo this;; 1) echo another;; *) exit 1;; esac");
    Ok(guest.ask(&script)? == "this")
}

#[test]
fn containers_go_on_under_a_newer_podman() -> Result<()> {
    let images = Images::ensure()?;
    let (boot, layer) = images.podman()?;
    let mut checks = Checks::new("podman: containers of podman 4.3 in the assisted flow, which brings podman 5.4");
    let network = Network::new()?;
    let work = work_dir("podman-registry")?;
    let (storage, image) = derive_tree(images, "node-a", &work, &layer)?;
    let registry = Registry::start(&storage, &work, Some(network.pid()), None)?;
    let setup = Setup { name: "podman", boot: &boot, kargs: &[], live: true };
    // Which image it will be is not known when the medium boots: the generator leaves the boot alone.
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &image.by_digest(), "127.0.0.1", registry.port)?;
        files.put("/etc/containers/containers.conf.d/50-testbed.conf", 0o644, LIMITS)?;
        files.put("/etc/app", 0o755, APP)?;
        files.put("/etc/systemd/system/app.service", 0o644, SERVICE)?;
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    if !checks.check("podman 4.3 runs containers: detached ones, and one as a service", || {
        contains(&guest.ask("podman --version")?, "version 4.3.")?;
        guest.ask(IMAGE)?;
        login(&guest, "podman run --detach --name detached --network=none localhost/app app")?;
        login(&guest, "podman run --detach --rm --name passing --network=none localhost/app app")?;
        guest.ask("systemctl start app.service")?;
        wait_for("all to work", SOON, || {
            CONTAINERS.iter().try_fold(true, |all, one| Ok(all && worked(&guest, one)? > 1))
        })?;
        CONTAINERS.iter().try_for_each(|one| same(monitor_is_new(&guest, one)?, true))
    }) {
        return checks.finish();
    }
    let before = CONTAINERS.iter().map(|one| processes(&guest, one)).collect::<Result<Vec<_>>>()?;
    let service = "systemctl show -p MainPID -p InvocationID -p ActiveState -p NRestarts app.service";
    let (unit, begun) = (guest.ask(service)?, worked(&guest, "detached")?);

    if !checks.check("the installer's units are started without blocking, and become active", || {
        guest.ask("mv /etc/later /etc/node-image-pivot.conf.d && systemctl daemon-reload")?;
        guest.ask(&format!("systemctl start --no-block {UNITS}"))?;
        guest.wait_unit("node-image-overlay.service", "active", PIVOT)
    }) {
        return checks.finish();
    }
    checks.check("podman, runc and conmon are the node image's", || {
        contains(&guest.ask("podman --version")?, "version 5.4.")?;
        contains(&guest.ask("runc --version")?, "version 1.1.15")?;
        contains(&guest.ask("conmon --version")?, "version 2.1.12")
    });
    checks.check("the service that runs podman is the same invocation, its main process the old podman", || {
        same(guest.ask(service)?, unit.clone())?;
        same(runs(&guest, &guest.unit("app.service", "MainPID")?, "/usr/bin/podman")?, false)
    });
    checks.check("containers have the processes that they had, and the bootimage's monitors", || {
        for (one, before) in CONTAINERS.iter().zip(&before) {
            same(&processes(&guest, one)?, before)?;
            same(monitor_is_new(&guest, one)?, false)?;
        }
        Ok(())
    });
    checks.check("they have gone on working", || {
        let now = worked(&guest, "detached")?;
        if now > begun { Ok(()) } else { bail!("{begun} lines before, {now} after") }
    });
    under_the_new_podman(&guest, &mut checks);
    at_last(&guest, &mut checks);
    checks.finish()
}

fn under_the_new_podman(guest: &dyn Guest, checks: &mut Checks) {
    checks.check("the new podman lists them as running", || {
        let list = ask(guest, "podman ps --sort names --format '{{.Names}} {{.State}}'")?;
        same(list, CONTAINERS.map(|one| format!("{one} running")).join("\n"))
    });
    checks.check("it starts programs in them", || {
        for one in CONTAINERS {
            same(ask(guest, &format!("podman exec {one} echo alive"))?, "alive".into())?;
        }
        Ok(())
    });
    checks.check("one that has the host's root mounted sees the new /usr there", || {
        contains(&ask(guest, "podman exec service cat /host/usr/lib/os-release")?, "Debian GNU/Linux 13")
    });
    checks.check("it has their logs", || contains(&ask(guest, "podman logs detached")?, "begun"));
    checks.check("a new container starts from the image that the old podman stored, with the new monitor", || {
        same(ask(guest, "podman run --rm --network=none localhost/app echo new")?, "new".into())?;
        login(guest, "podman run --detach --name new --network=none localhost/app app")?;
        same(monitor_is_new(guest, "new")?, true)?;
        ask(guest, "podman rm --force --time 20 new").map(drop)
    });
}

fn at_last(guest: &dyn Guest, checks: &mut Checks) {
    checks.check("one that ends is removed: its old monitor calls the new podman", || {
        let ids = inspect(guest, "passing", &["Id", "State.Pid"])?;
        let Some((id, pid)) = ids.split_once(' ') else { bail!("{ids}") };
        let storage = format!("test -d {STORAGE}/overlay-containers/{id}");
        guest.ask(&format!("{storage} && kill {pid}"))?;
        // Nobody asks podman meanwhile: it would notice by itself.
        wait_for("its storage to be gone", SOON, || Ok(guest.run(&storage)?.status == 1))
    });
    checks.check("podman stop ends an old one, which says its last words and its exit status", || {
        ask(guest, "podman stop --time 20 detached")?;
        same(inspect(guest, "detached", &["State.Status", "State.ExitCode"])?, "exited 7".into())?;
        // The journal has them, a moment later.
        wait_for("the last words", SOON, || Ok(ask(guest, "podman logs detached")?.contains("told to end")))
    });
    checks.check("it starts again, with the new monitor, and can be removed", || {
        login(guest, "podman start detached")?;
        same(monitor_is_new(guest, "detached")?, true)?;
        ask(guest, "podman rm --force --time 20 detached").map(drop)
    });
    checks.check("systemctl stop ends the service and its container", || {
        guest.ask("systemctl stop app.service")?;
        same(guest.unit("app.service", "Result")?, "success".into())?;
        wait_for("no container", SOON, || Ok(ask(guest, "podman ps --all --quiet")?.is_empty()))
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
}
