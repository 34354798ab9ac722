//! What happens to units: each class on a real systemd in a container, with a node image that defines them otherwise.
//! `cargo test -p testbed --test units -- --test-threads=1 --nocapture`

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::check::{Checks, contains, same};
use testbed::container::{Container, Network, Setup};
use testbed::derived::derive;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::{succeed, wait_for};
use testbed::registry::Registry;
use testbed::scenario::{node_files, wait_pivoted};

const PIVOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(60);

/// Services of the administrator; what the node image has to say about each is a drop-in in its /usr.
const SERVICES: [&str; 12] = [
    "t-exec",
    "t-harmless",
    "t-root",
    "t-reload",
    "t-never",
    "t-key-restart",
    "t-config",
    "t-needed",
    "t-refuses",
    "t-arrives",
    "t-socket",
    "t-listen",
];

/// What the node image changes: (path, text).
const LAYER: &[(&str, &str)] = &[
    ("usr/lib/systemd/system/t-exec.service.d/10-node.conf", "[Service]\nExecStart=\nExecStart=/bin/sleep 9001\n"),
    (
        "usr/lib/systemd/system/t-harmless.service.d/10-node.conf",
        "[Unit]\nDescription=Another\nAfter=basic.target\n[Service]\nTimeoutStopSec=7\n",
    ),
    (
        "usr/lib/systemd/system/t-reload.service.d/10-node.conf",
        "[Unit]\nX-NodeImagePivot=reload\n[Service]\nEnvironment=A=1\nExecReload=/bin/touch /run/t-reloaded\n",
    ),
    (
        "usr/lib/systemd/system/t-never.service.d/10-node.conf",
        "[Unit]\nX-NodeImagePivot=never\n[Service]\nEnvironment=A=1\n",
    ),
    (
        "usr/lib/systemd/system/t-key-restart.service.d/10-node.conf",
        "[Unit]\nX-NodeImagePivot=restart\n[Service]\nEnvironment=A=1\n",
    ),
    ("usr/lib/systemd/system/t-config.service.d/10-node.conf", "[Service]\nEnvironment=A=1\n"),
    ("usr/lib/systemd/system/t-needed.service.d/10-node.conf", "[Service]\nEnvironment=A=1\n"),
    ("usr/lib/systemd/system/t-refuses.service.d/10-node.conf", "[Service]\nEnvironment=A=1\n"),
    ("usr/lib/systemd/system/t-arrives.socket", "[Socket]\nListenStream=/run/t-arrives\n"),
    ("usr/lib/systemd/system/t-socket.service.d/10-node.conf", "[Service]\nEnvironment=WORD=new\n"),
    (
        "usr/lib/systemd/system/t-listen.socket.d/10-node.conf",
        "[Socket]\nListenStream=\nListenStream=/run/t-listen.new\n",
    ),
    // A fragment of the image's own, and one that the bootimage does not have.
    ("usr/lib/systemd/system/t-new.service", "[Service]\nExecStart=/bin/sleep 9002\n"),
    ("usr/lib/systemd/system/multi-user.target.d/10-node.conf", "[Unit]\nWants=t-new.service t-arrives.socket\n"),
];

/// Answers one connection on its socket after the other with its WORD.
const ANSWERS: &str = "open(my $listening, '+<&=', 3) or die;\n\
    while (accept(my $connection, $listening)) {\n\
    sysread $connection, my $asked, 4096; syswrite $connection, $ENV{WORD} // 'old'; close $connection }\n";

/// Whether it is there for its socket.
fn listens(name: &str) -> bool {
    matches!(name, "t-socket" | "t-listen")
}

fn put_units(files: &Files, wanted_by: &str) -> Result<()> {
    let system = "/etc/systemd/system";
    files.put("/etc/t-answers", 0o755, ANSWERS)?;
    for name in SERVICES {
        let start = match name {
            _ if listens(name) => "/usr/bin/perl /etc/t-answers",
            // Nothing of it is in /usr: only its definition can make it old.
            "t-harmless" => "/var/t-static",
            // The same program at a path that the node image has another file at, in a root directory of its own.
            "t-root" => "/usr/bin/base-tool\nRootDirectory=/var/t-root",
            _ => "/bin/sleep 9000",
        };
        let unit = match name {
            "t-config" => "[Unit]\nRequires=t-needed.service\n",
            "t-refuses" => "[Unit]\nRefuseManualStop=yes\n",
            _ => "",
        };
        files.put(&format!("{system}/{name}.service"), 0o644, &format!("{unit}[Service]\nExecStart={start}\n"))?;
        let unit = if listens(name) {
            let text = format!("[Socket]\nListenStream=/run/{name}\n");
            files.put(&format!("{system}/{name}.socket"), 0o644, &text)?;
            format!("{name}.socket")
        } else {
            format!("{name}.service")
        };
        link(files, wanted_by, &unit)?;
    }
    link(files, wanted_by, "base-legacy.service")?;
    files.put("/var/t-static", 0o755, "")?;
    let program = files.root().join("var/t-static.rs");
    std::fs::write(&program, "fn main() { loop { std::thread::park() } }")?;
    let mut build = Command::new("rustc");
    build.args(["-C", "target-feature=+crt-static", "-o"]).arg(files.root().join("var/t-static")).arg(&program);
    succeed(&mut build)?;
    let bin = files.root().join("var/t-root/usr/bin");
    std::fs::create_dir_all(&bin)?;
    std::fs::copy(files.root().join("var/t-static"), bin.join("base-tool"))?;
    files.put("/etc/node-image-pivot.conf.d/60-units.toml", 0o644, "[units]\n\"t-conf*\" = \"never\"\n")
}

fn link(files: &Files, target: &str, unit: &str) -> Result<()> {
    let wants = files.root().join(format!("etc/systemd/system/{target}.wants"));
    std::fs::create_dir_all(&wants)?;
    Ok(std::os::unix::fs::symlink(format!("/etc/systemd/system/{unit}"), wants.join(unit))?)
}

fn pid(guest: &dyn Guest, unit: &str) -> Result<String> {
    let pid = guest.unit(unit, "MainPID")?;
    if pid == "0" { bail!("{unit} does not run") } else { Ok(pid) }
}

fn ask_socket(guest: &dyn Guest, path: &str) -> Result<String> {
    guest.ask(&format!("curl -s --http0.9 --max-time 20 --unix-socket {path} http://x/ || true"))
}

fn class_of<'a>(plan: &'a Value, unit: &str) -> Result<&'a str> {
    let list = plan["plan"]["units"].as_array().context("no units in the plan")?;
    let found = list.iter().find(|one| one["unit"] == unit);
    found.and_then(|one| one["class"].as_str()).with_context(|| format!("nothing about {unit}:\n{list:#?}"))
}

/// The whole bootstrap flow, with the units running in the pivot target.
#[test]
fn each_class_in_the_bootstrap_flow() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("units: the bootstrap flow");
    let network = Network::new()?;
    let work = work_dir("units-bootstrap-registry")?;
    let (storage, image) = derive(images, "node-b", &work, LAYER)?;
    let mut registry = Registry::start(&storage, &work, Some(network.pid()), None)?;
    registry.stop();
    let setup = Setup { name: "units-bootstrap", boot: &images.boot, kargs: &[], live: true };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &image.by_digest(), "127.0.0.1", registry.port)?;
        // A default target of the administrator's own, that is isolated in the end.
        files.put(
            "/etc/systemd/system/custom.target",
            0o644,
            "[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\nAllowIsolate=yes\n",
        )?;
        std::os::unix::fs::symlink("custom.target", files.root().join("etc/systemd/system/default.target"))?;
        for name in SERVICES {
            link(files, "custom.target", &format!("{name}.{}", if listens(name) { "socket" } else { "service" }))?;
        }
        put_units(files, "node-image-pivot.target")
    })?;
    let running = Vec::from_iter(SERVICES.into_iter().filter(|name| !listens(name)));
    for name in &running {
        guest.wait_unit(&format!("{name}.service"), "active", SOON)?;
    }
    guest.wait_unit("base-legacy.service", "active", SOON)?;
    checks.check("before: both sockets answer", || {
        same(ask_socket(&guest, "/run/t-socket")?, "old".into())?;
        same(ask_socket(&guest, "/run/t-listen")?, "old".into())
    });
    let before: Vec<_> = running.iter().map(|name| pid(&guest, &format!("{name}.service"))).collect::<Result<_>>()?;
    registry.resume()?;

    if !checks.check("it becomes the node image", || {
        wait_pivoted(&guest, PIVOT)?;
        same(guest.ask("base-tool")?, "base-tool 2.0".into())
    }) {
        return checks.finish();
    }
    let after = |name: &str| pid(&guest, &format!("{name}.service"));
    let was = |name: &str| before[running.iter().position(|&one| one == name).unwrap_or_default()].clone();
    let plan: Value = serde_json::from_str(&guest.ask("cat /run/node-image-pivot/plan.json")?)?;
    let plan = serde_json::json!({ "plan": plan });

    checks.check("restart: a drop-in changes ExecStart", || {
        contains(
            &guest.ask("tr '\\0' ' ' </proc/$(systemctl show -p MainPID --value t-exec.service)/cmdline")?,
            "9001",
        )?;
        same(class_of(&plan, "t-exec.service")?, "restart")
    });
    checks.check("restart: the unit's key asks for it", || {
        if after("t-key-restart")? == was("t-key-restart") {
            bail!("the same process")
        }
        same(class_of(&plan, "t-key-restart.service")?, "restart")
    });
    checks.check(
        "none: description, order, timeouts: the same main process in the final target, with the new timeout",
        || {
            same(after("t-harmless")?, was("t-harmless"))?;
            same(guest.unit("t-harmless.service", "TimeoutStopUSec")?, "7s".into())?;
            if class_of(&plan, "t-harmless.service").is_ok() {
                bail!("it is in the plan")
            }
            Ok(())
        },
    );
    checks.check("none: what runs in another root directory, whatever its paths are called", || {
        same(after("t-root")?, was("t-root"))?;
        if class_of(&plan, "t-root.service").is_ok() {
            bail!("it is in the plan")
        }
        Ok(())
    });
    checks.check("reload: the key asks for it; the process stays", || {
        same(after("t-reload")?, was("t-reload"))?;
        guest.ask("test -e /run/t-reloaded")?;
        same(class_of(&plan, "t-reload.service")?, "reload")
    });
    checks.check("never: by the key, by the configuration", || {
        same(after("t-never")?, was("t-never"))?;
        same(after("t-config")?, was("t-config"))?;
        same(class_of(&plan, "t-never.service")?, "never")?;
        same(class_of(&plan, "t-config.service")?, "never")
    });
    checks.check("never: what one that is to stay requires, and what systemd stops for no one by hand", || {
        same(after("t-needed")?, was("t-needed"))?;
        same(after("t-refuses")?, was("t-refuses"))?;
        same(class_of(&plan, "t-needed.service")?, "never")?;
        same(class_of(&plan, "t-refuses.service")?, "never")
    });
    checks.check("start: a new socket of a service that runs; the service starts anew behind it", || {
        same(class_of(&plan, "t-arrives.socket")?, "start")?;
        same(guest.unit("t-arrives.socket", "ActiveState")?, "active".into())?;
        if after("t-arrives")? == was("t-arrives") {
            bail!("the same process, without the socket")
        }
        contains(&guest.ask("journalctl -u node-image-pivotd.service -o cat")?, "t-arrives.socket: start: ")
    });
    checks.check("stop: the node image has no such unit", || {
        same(guest.unit("base-legacy.service", "ActiveState")?, "inactive".into())?;
        same(class_of(&plan, "base-legacy.service")?, "stop")?;
        contains(&guest.ask("journalctl -u node-image-pivotd.service -o cat")?, "base-legacy.service: stop: ")
    });
    checks.check("start: what the node image newly wants", || {
        same(class_of(&plan, "t-new.service")?, "start")?;
        same(class_of(&plan, "kubelet.service")?, "start")?;
        after("t-new").map(drop)
    });
    checks.check("socket: the service was stopped, its socket never; the next connection gets the new one", || {
        same(guest.unit("t-socket.service", "ActiveState")?, "inactive".into())?;
        same(ask_socket(&guest, "/run/t-socket")?, "new".into())?;
        same(class_of(&plan, "t-socket.service")?, "restart")
    });
    checks.check("socket: another address is listened on", || {
        same(ask_socket(&guest, "/run/t-listen.new")?, "old".into())?;
        same(class_of(&plan, "t-listen.socket")?, "restart")
    });
    checks.check("the default target of this machine is where it is", || {
        same(guest.unit("custom.target", "ActiveState")?, "active".into())?;
        same(guest.unit("node-image-pivot.target", "ActiveState")?, "inactive".into())
    });
    checks.check("status says what still runs old code, in words and in JSON", || {
        let status = guest.status()?;
        if !status["still_old"].is_array() {
            bail!("no still_old: {status}")
        }
        contains(&guest.ask("node-image-pivot report")?, "restarted: ")
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}

/// A live system: nothing is stopped, whatever the image says; the plan tells why. Then finish, by hand.
#[test]
fn a_live_system_loses_nothing() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("units: a live system");
    let network = Network::new()?;
    let work = work_dir("units-live-registry")?;
    let (storage, image) = derive(images, "node-a", &work, LAYER)?;
    let registry = Registry::start(&storage, &work, Some(network.pid()), None)?;
    let setup = Setup { name: "units-live", boot: &images.boot, kargs: &[], live: true };
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &image.by_digest(), "127.0.0.1", registry.port)?;
        put_units(files, "multi-user.target")?;
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", SOON)?;
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d")?;
    same(ask_socket(&guest, "/run/t-socket")?, "old".into())?;
    let units =
        "t-exec t-harmless t-root t-reload t-never t-key-restart t-config t-socket base-legacy systemd-networkd";
    let pids = || guest.ask(&format!("for u in {units}; do echo $u $(systemctl show -p MainPID --value $u); done"));
    let before = pids()?;

    checks.check("plan: classes and reasons, before anything happens", || {
        let plan: Value = serde_json::from_str(&guest.ask("node-image-pivot plan --json")?)?;
        for (unit, class) in [
            ("t-exec.service", "never"),
            ("t-reload.service", "reload"),
            ("t-key-restart.service", "never"),
            ("base-legacy.service", "never"),
            ("t-listen.socket", "never"),
            ("t-needed.service", "never"),
            ("ssh.service", "restart"),
            ("systemd-logind.service", "restart"),
            ("dbus.service", "never"),
            ("systemd-networkd.service", "never"),
        ] {
            same((unit, class_of(&plan, unit)?), (unit, class))?;
        }
        contains(&guest.ask("node-image-pivot plan")?, "unit: never t-exec.service ([Service] ExecStart= changed")?;
        same(pids()?, before.clone())
    });
    let host_keys = "cd /etc/ssh && stat -c '%n %a %u %g' ssh_host_* && sha256sum ssh_host_*";
    let keys = guest.ask(host_keys)?;
    let old = || -> Result<Vec<String>> {
        let status = guest.status()?;
        let list = status["still_old"].as_array().context("no still_old")?;
        Ok(list.iter().filter_map(|one| one["unit"].as_str().map(str::to_owned)).collect())
    };
    let has = |unit: &str| -> Result<bool> { Ok(old()?.iter().any(|one| one == unit)) };
    let session = std::thread::scope(|scope| {
        let session = scope.spawn(|| {
            guest.login("touch /run/t-session; base-tool; until test -e /run/t-switched; do sleep 0.2; done; base-tool")
        });
        checks.check("an ssh session is open", || {
            wait_for("the session", SOON, || Ok(guest.run("test -e /run/t-session")?.status == 0))
        });
        let user = guest.ask("systemctl show -p MainPID --value user@0.service").unwrap_or_default();
        checks.check("switched: every process is the same, nothing has failed", || {
            guest.ask("node-image-pivot run")?;
            same(guest.ask("base-tool")?, "base-tool 2.0".into())?;
            same(pids()?, before.clone())?;
            guest.ask("test -e /run/t-reloaded")?;
            same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
        });
        checks.check("sshd: a new login gets the new one right after; host keys are as they were", || {
            contains(&guest.login("ssh -V 2>&1")?.text, "OpenSSH_10")?;
            same(guest.ask(host_keys)?, keys.clone())
        });
        checks.check("status says what still runs old code", || {
            same(has("dbus.service")?, true)?;
            same(has("systemd-networkd.service")?, true)?;
            same(has("ssh.service")?, false)?;
            same(has("t-root.service")?, false)?;
            contains(&guest.ask("node-image-pivot status")?, "still runs the bootimage's code: dbus.service (/usr/")
        });
        checks.check("a user's manager is the same process, and the new systemd", || {
            let maps = || guest.ask("cat /proc/$(systemctl show -p MainPID --value user@0.service)/maps");
            wait_for("the new one", SOON, || Ok(maps()?.contains("libsystemd-shared-257")))?;
            same(guest.ask("systemctl show -p MainPID --value user@0.service")?, user.clone())?;
            guest.login("systemctl --user start default.target").map(drop)
        });
        checks.check("finish by hand: what the isolate rearranges is the node image's, and nothing fails", || {
            guest.ask("node-image-pivot finish")?;
            wait_pivoted_by_hand(&guest)?;
            same(has("dbus.service")?, true)?;
            same(has("systemd-networkd.service")?, false)?;
            pid(&guest, "systemd-networkd.service")?;
            same(guest.unit("t-new.service", "ActiveState")?, "active".into())?;
            same(guest.unit("t-arrives.socket", "ActiveState")?, "active".into())?;
            same(guest.unit("base-legacy.service", "ActiveState")?, "inactive".into())?;
            same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
        });
        // In any case, or the session would never end.
        let told = guest.ask("touch /run/t-switched");
        session.join().map(|answer| (told, answer))
    });
    checks.check("sshd: the session from before has lived through the switch and the isolate", || {
        let Ok((told, answer)) = session else { bail!("the session's thread panicked") };
        told?;
        let answer = answer?;
        same((answer.status, answer.text.trim().to_owned()), (0, "base-tool 1.0\nbase-tool 2.0".to_owned()))
    });
    checks.check("undo: what was stopped runs again, and what was restarted is the bootimage's", || {
        guest.ask("node-image-pivot undo")?;
        same(guest.unit("base-legacy.service", "ActiveState")?, "active".into())?;
        same(guest.unit("t-new.service", "ActiveState")?, "inactive".into())?;
        contains(
            &guest.ask("tr '\\0' ' ' </proc/$(systemctl show -p MainPID --value t-exec.service)/cmdline")?,
            "9000",
        )?;
        same(guest.ask("systemctl --failed --no-legend --plain")?, String::new())
    });
    checks.finish()
}

fn wait_pivoted_by_hand(guest: &dyn Guest) -> Result<()> {
    wait_for("the end of all jobs", SOON, || Ok(guest.ask("systemctl list-jobs --no-legend | wc -l")? == "0"))
}
