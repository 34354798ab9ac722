//! Units after the switch: each class, on a real systemd in a container, with a node image that defines the units
//! differently. `make check-one NAME=units`

mod bootstrap;
mod live;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::container::{Bed, Serving};
use testbed::derived::derive;
use testbed::files::Files;
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::succeed;

const PIVOT: Duration = Duration::from_secs(400);
const SOON: Duration = Duration::from_secs(150);

/// Services of the administrator. The node image changes each by a drop-in in its /usr.
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

/// Files of the node image that change the units: path and text.
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
    // A unit that the bootimage does not have.
    ("usr/lib/systemd/system/t-new.service", "[Service]\nExecStart=/bin/sleep 9002\n"),
    // Units that would end the boot.
    ("usr/lib/systemd/system/zincati.service", "[Service]\nExecStart=/bin/sleep 9003\n"),
    ("usr/lib/systemd/system/t-reboots.timer", "[Timer]\nOnActiveSec=1s\nAccuracySec=1s\n"),
    ("usr/lib/systemd/system/t-reboots.service", "[Service]\nType=oneshot\nExecStart=/usr/bin/systemctl reboot\n"),
    (
        "usr/lib/systemd/system/multi-user.target.d/10-node.conf",
        "[Unit]\nWants=t-new.service t-arrives.socket zincati.service t-reboots.timer\n",
    ),
];

/// Answers each connection on its socket with its WORD.
const ANSWERS: &str = "open(my $listening, '+<&=', 3) or die;\n\
    while (accept(my $connection, $listening)) {\n\
    sysread $connection, my $asked, 4096; syswrite $connection, $ENV{WORD} // 'old'; close $connection }\n";

/// Returns true if a socket starts the service.
fn listens(name: &str) -> bool {
    matches!(name, "t-socket" | "t-listen")
}

fn put_units(files: &Files, wanted_by: &str) -> Result<()> {
    let system = "/etc/systemd/system";
    files.put("/etc/t-answers", 0o755, ANSWERS)?;
    for name in SERVICES {
        let start = match name {
            _ if listens(name) => "/usr/bin/perl /etc/t-answers",
            // No file of it is in /usr, so only its definition can make it stale.
            "t-harmless" => "/var/t-static",
            // The same program, in a separate root directory, at a path where the node image has another file.
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

/// Boots a container with these units, which becomes `base` with [`LAYER`] on top.
fn boot(name: &str, base: &str, serving: Serving, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Bed> {
    boot_with(name, base, LAYER, serving, fill)
}

/// The same with another layer.
fn boot_with(
    name: &str,
    base: &str,
    layer: &[(&str, &str)],
    serving: Serving,
    fill: impl FnOnce(&Files) -> Result<()>,
) -> Result<Bed> {
    let (storage, image) = derive(Images::ensure()?, base, &work_dir(&format!("{name}-image"))?, layer)?;
    Bed::boot_from(&storage, &image.by_digest(), name, serving, fill)
}
