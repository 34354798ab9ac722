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
    vm::Setup { name, boot: &images.boot, disk: None, kargs: &[], memory_mib: 3072, limit: Duration::from_secs(900) }
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

/// The same release with packages newer, added and removed; by tag.
#[test]
fn same_release_other_packages() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b")?);
    let mut checks = Checks::new("machine: Debian 12 becomes node image b (Debian 12, other packages)");
    let registry = Registry::start(&images.storage, &work_dir("vm-b-registry")?, None, None)?;
    let guest = Vm::start(images, &setup("vm-b", images), |files| {
        node_files(files, &expected.image.by_tag(), vm::HOST, registry.port)
    })?;
    if !checks.check("ssh answers", || guest.wait_ssh(BOOT)) {
        return checks.finish();
    }
    let before = Before::of(&guest)?;
    if checks.check("it becomes the node image", || wait_pivoted(&guest, &checks_note(), PIVOT)) {
        pivoted(&guest, &before, &expected, &mut checks);
    }
    checks.finish()
}

/// A bootimage that already has the cluster's binaries.
#[test]
fn with_the_binaries_it_is_left_alone() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("machine: a bootimage that has the binaries");
    let mut setup = setup("vm-binaries", images);
    setup.boot = &images.boot_binaries;
    let guest =
        Vm::start(images, &setup, |files| node_files(files, &images.image("node-a")?.by_digest(), vm::HOST, 1))?;
    checks.check("ssh answers", || guest.wait_ssh(BOOT));
    left_alone(&guest, &mut checks);
    checks.finish()
}
