//! Issue 2, item 6 on real machines: kernel, initramfs, systemd, registry, and a pivot to either node image.
//! `cargo test -p testbed --test vm -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::{Result, bail};
use testbed::check::{Checks, contains, same};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::proc::wait_for;
use testbed::registry::Registry;
use testbed::scenario::{Before, Expected, left_alone, node_files, pivoted, wait_pivoted, waits_and_says_why};
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(180);
const PIVOT: Duration = Duration::from_secs(420);

fn setup<'a>(name: &'a str, images: &'a Images) -> vm::Setup<'a> {
    let limit = Duration::from_secs(900);
    vm::Setup { name, boot: &images.boot, disk: None, kargs: &[], memory_mib: 3072, cpu: vm::CPU, limit }
}

/// Debian 13 over Debian 12; the registry is down at first.
#[test]
fn next_release_after_waiting_for_the_registry() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_a(images.image("node-a")?);
    let mut checks = Checks::new("machine: Debian 12 becomes node image a (Debian 13), the registry comes late");
    let mut registry = Registry::start(&images.storage, &work_dir("vm-a-registry")?, None, None)?;
    registry.stop();
    let guest = Vm::start(images, &setup("vm-a", images), |files| {
        node_files(files, &expected.image.by_digest(), vm::HOST, registry.port)
    })?;
    if !checks.check("ssh answers", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    let before = Before::of(&guest)?;
    waits_and_says_why(&guest, &mut checks);
    checks.check("registry down: the console takes a login", || {
        contains(&guest.console_run("base-tool", Duration::from_secs(90))?, "base-tool 1.0")
    });
    checks.check("registry down: a new ssh login works", || {
        same(guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
    });

    registry.resume()?;
    checks.note("the registry is back");
    checks.check("it goes on by itself; ssh and console logins work while it pulls", || {
        wait_for("the pull", Duration::from_secs(120), || {
            Ok(guest.status()?["progress"]["bytes_fetched"].as_u64().unwrap_or(0) > 0)
        })?;
        same(guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())?;
        let state = guest.unit("node-image-pull.service", "ActiveState")?;
        if state != "activating" {
            bail!("the pull was over ({state}) before the login: nothing shown");
        }
        contains(&guest.console_run("base-tool", Duration::from_secs(60))?, "base-tool ")
    });
    if checks.check("it becomes the node image", || wait_pivoted(&guest, &checks_note(), PIVOT)) {
        pivoted(&guest, &before, &expected, &mut checks);
        checks.check("the console takes a login afterwards", || {
            contains(&guest.console_run("base-tool", Duration::from_secs(90))?, "base-tool 2.0")
        });
    }
    checks.finish()
}

/// A list of its own for notes made inside an assertion.
fn checks_note() -> Checks {
    Checks::new("progress")
}

/// The same release with packages newer, added and removed; by tag. Configured at first is an image that needs another
/// CPU.
#[test]
fn same_release_other_packages() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b")?);
    let mut checks = Checks::new("machine: Debian 12 becomes node image b (Debian 12, other packages)");
    let registry = Registry::start(&images.storage, &work_dir("vm-b-registry")?, None, None)?;
    let guest = Vm::start(images, &setup("vm-b", images), |files| {
        node_files(files, &images.image("newer-cpu")?.by_digest(), vm::HOST, registry.port)
    })?;
    if !checks.check("ssh answers", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    let before = Before::of(&guest)?;
    checks.check("an image for a newer CPU is refused, with the reason", || {
        wait_for("the refusal", PIVOT, || Ok(guest.unit("node-image-pull.service", "ActiveState")? == "failed"))?;
        let status = guest.status()?;
        same(status["error"]["class"].as_str(), Some("refused"))?;
        let message = status["error"]["message"].as_str().unwrap_or_default();
        println!("       {message}");
        contains(message, "trial run of /usr/bin/true")?;
        contains(message, "built for a newer CPU than this machine's")
    });
    checks.check("refused: nothing changed, and the machine can be reached", || {
        same(guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(guest.run("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?.text.trim().into(), "0".to_owned())?;
        guest.ask("/usr/bin/true; test ! -e /run/node-image-pivot/pivoted; test -e /etc/base-legacy.conf")?;
        same(guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
    });
    checks.check("with another image configured, the unit that waited is started again", || {
        let image = expected.image.by_tag();
        guest.ask(&format!(
            "echo 'image = \"{image}\"' >/etc/node-image-pivot.conf.d/50-testbed.toml
             systemctl start --no-block node-image-finish.service"
        ))?;
        wait_for("the next attempt", PIVOT, || Ok(guest.status()?["state"] != "failed"))
    });
    if checks.check("it becomes the node image", || wait_pivoted(&guest, &checks_note(), PIVOT)) {
        pivoted(&guest, &before, &expected, &mut checks);
    }
    checks.finish()
}

/// A bootimage that already has the cluster's binaries. Its CPU has what the image wants that `vm-b` refuses.
#[test]
fn with_the_binaries_it_is_left_alone() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("machine: a bootimage that has the binaries");
    let mut setup = setup("vm-binaries", images);
    setup.boot = &images.boot_binaries;
    setup.cpu = "max";
    let newer = images.image("newer-cpu")?;
    let registry = Registry::start(&images.storage, &work_dir("vm-binaries-registry")?, None, None)?;
    let guest = Vm::start(images, &setup, |files| node_files(files, &newer.by_digest(), vm::HOST, registry.port))?;
    checks.check("ssh answers", || guest.wait_ssh(BOOT));
    left_alone(&guest, &mut checks);
    checks.check(
        "told to pivot all the same, and with the CPU that the image needs: it does, and the program runs",
        || {
            guest.ask(
                "cp /usr/bin/true /run/before; echo 'mode = \"force\"' >/etc/node-image-pivot.conf.d/60-force.toml",
            )?;
            guest.ask("node-image-pivot run")?;
            guest.ask("! cmp -s /usr/bin/true /run/before && /usr/bin/true").map(drop)
        },
    );
    checks.finish()
}
