//! The same on a real systemd as PID 1 in a container: seconds instead of minutes, everything but the kernel.
//! `cargo test -p testbed --test container -- --test-threads=1 --nocapture`

use std::time::Duration;

use anyhow::Result;
use testbed::check::{Checks, contains, same};
use testbed::container::{Container, Network, Setup};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::registry::{Registry, auth_file};
use testbed::scenario::{Before, Expected, left_alone, node_files, pivoted, wait_pivoted, waits_and_says_why};

const PIVOT: Duration = Duration::from_secs(180);

fn setup<'a>(name: &'a str, images: &'a Images) -> Setup<'a> {
    Setup { name, boot: &images.boot, kargs: &[], live: true }
}

#[test]
fn next_release_after_waiting_for_the_registry() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_a(images.image("node-a")?);
    let mut checks = Checks::new("container: Debian 12 becomes node image a (Debian 13), the registry comes late");
    let network = Network::new()?;
    let mut registry = Registry::start(&images.storage, &work_dir("container-a-registry")?, Some(network.pid()), None)?;
    registry.stop();
    let guest = Container::start(images, &network, &setup("container-a", images), |files| {
        node_files(files, &expected.image.by_digest(), "127.0.0.1", registry.port)
    })?;
    let before = Before::of(&guest)?;
    waits_and_says_why(&guest, &mut checks);
    checks.check("registry down: a new ssh login works", || {
        same(guest.login("base-tool")?.text.trim().into(), "base-tool 1.0".to_string())
    });
    registry.resume()?;
    checks.note("the registry is back");
    if checks.check("it goes on by itself and becomes the node image", || {
        wait_pivoted(&guest, &Checks::new("progress"), PIVOT)
    }) {
        pivoted(&guest, &before, &expected, &mut checks);
    }
    checks.finish()
}

/// Behind a login this time, with the auth file that the contract names.
#[test]
fn same_release_other_packages_with_a_login() -> Result<()> {
    let images = Images::ensure()?;
    let expected = Expected::node_b(images.image("node-b")?);
    let mut checks = Checks::new("container: Debian 12 becomes node image b, from a registry that wants a login");
    let network = Network::new()?;
    let login = Some(("core", "secret"));
    let registry = Registry::start(&images.storage, &work_dir("container-b-registry")?, Some(network.pid()), login)?;
    let guest = Container::start(images, &network, &setup("container-b", images), |files| {
        node_files(files, &expected.image.by_tag(), "127.0.0.1", registry.port)?;
        files.put(
            "/var/roothome/.docker/config.json",
            0o600,
            &auth_file(&format!("127.0.0.1:{}", registry.port), "core", "secret"),
        )
    })?;
    let before = Before::of(&guest)?;
    if checks.check("it becomes the node image", || wait_pivoted(&guest, &Checks::new("progress"), PIVOT)) {
        pivoted(&guest, &before, &expected, &mut checks);
    }
    checks.finish()
}

#[test]
fn with_the_binaries_it_is_left_alone() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("container: a bootimage that has the binaries");
    let network = Network::new()?;
    let mut setup = setup("container-binaries", images);
    setup.boot = &images.boot_binaries;
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", 1)
    })?;
    left_alone(&guest, &mut checks);
    checks.finish()
}

#[test]
fn switched_off_by_the_kernel_command_line() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("container: node-image-pivot=off");
    let network = Network::new()?;
    let mut setup = setup("container-off", images);
    setup.kargs = &["node-image-pivot=off"];
    let guest = Container::start(images, &network, &setup, |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", 1)
    })?;
    left_alone(&guest, &mut checks);
    checks.finish()
}

/// Whoever names a unit on the kernel command line gets to it: a pivot in between would be none of what was asked for.
#[test]
fn told_where_to_go_it_goes_there() -> Result<()> {
    let images = Images::ensure()?;
    for (word, target) in [("systemd.unit=rescue.target", "rescue.target"), ("emergency", "emergency.target")] {
        let mut checks = Checks::new(&format!("container: {word} on the kernel command line"));
        let network = Network::new()?;
        let mut setup = setup("container-told", images);
        let kargs = [word];
        setup.kargs = &kargs;
        let guest = Container::start(images, &network, &setup, |files| {
            node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", 1)
        })?;
        checks.check(&format!("{target} is reached"), || guest.wait_unit(target, "active", Duration::from_secs(60)));
        checks.check("no unit of ours ran", || {
            for unit in ["node-image-pivot.target", "node-image-pull.service", "node-image-pivotd.service"] {
                same(guest.unit(unit, "ActiveState")?, "inactive".into())?;
            }
            guest.ask("test ! -e /run/systemd/generator.early/default.target").map(drop)
        });
        checks.finish()?;
    }
    Ok(())
}

/// OpenSSH 10 has no DSA keys any more, and takes no configuration that names them; 9.2 does.
fn new_sshd_refuses(guest: &dyn Guest) -> Result<()> {
    let dropped = "/etc/ssh/sshd_config.d/50-old-clients.conf";
    guest.ask(&format!("echo 'PubkeyAcceptedAlgorithms +ssh-dss' >{dropped} && cp -a /etc /run/etc-before"))?;
    let answer = guest.run("node-image-pivot plan")?;
    let changed = guest.ask(
        "diff -r --no-dereference /run/etc-before /etc 2>&1 | grep -v 'is a socket\\|is a fifo' || true; base-tool",
    );
    guest.ask(&format!("rm {dropped}"))?;
    for part in ["refused before anything was changed", dropped, "Bad key types '+ssh-dss'", "correct /etc/ssh"] {
        contains(&answer.text, part)?;
    }
    same(answer.status, 10)?;
    same(changed?, "base-tool 1.0".into())
}

/// The file of [`new_sshd_refuses`] is gone: nothing else stands in the way.
fn sshd_without_keys(guest: &dyn Guest) -> Result<()> {
    guest.ask("mkdir /run/keys && mv /etc/ssh/ssh_host_* /run/keys")?;
    let answer = guest.ask("node-image-pivot plan --json");
    guest.ask("mv /run/keys/* /etc/ssh")?;
    let plan: serde_json::Value = serde_json::from_str(&answer?)?;
    same(plan["state"].clone(), "staged".into())?;
    same(plan["plan"]["warnings"].to_string().contains("sshd"), false)
}

/// The assisted installer's way: units started from outside on a system that is up, nothing isolated, nothing stopped.
#[test]
fn started_by_an_installer_nothing_is_isolated() -> Result<()> {
    let images = Images::ensure()?;
    let mut checks = Checks::new("container: the assisted installer's flow");
    let network = Network::new()?;
    let registry =
        Registry::start(&images.storage, &work_dir("container-assisted-registry")?, Some(network.pid()), None)?;
    // Which image it will be is not known when the medium boots: the generator leaves the boot alone.
    let guest = Container::start(images, &network, &setup("container-assisted", images), |files| {
        node_files(files, &images.image("node-a")?.by_digest(), "127.0.0.1", registry.port)?;
        Ok(std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?)
    })?;
    guest.wait_unit("multi-user.target", "active", Duration::from_secs(60))?;
    // Installers write units, too, and let systemd reload: now the generator would redirect.
    guest.ask("mv /etc/later /etc/node-image-pivot.conf.d && systemctl daemon-reload")?;
    checks.check("refused: the new sshd would not come up with this machine's /etc/ssh", || new_sshd_refuses(&guest));
    checks.check("an sshd that waits for its host keys is no reason to refuse", || sshd_without_keys(&guest));
    let legacy = guest.unit("base-legacy.service", "MainPID")?;
    checks.check("both units start without blocking", || {
        guest.ask("systemctl start --no-block node-image-pull.service node-image-overlay.service").map(drop)
    });
    checks.check("node-image-overlay.service becomes active", || {
        guest.wait_unit("node-image-overlay.service", "active", PIVOT)
    });
    checks.check("/usr/bin/oc is there", || guest.ask("oc version --client").map(drop));
    checks.check("what ran goes on running, in multi-user", || {
        same(guest.unit("base-legacy.service", "MainPID")?, legacy.clone())?;
        same(guest.unit("multi-user.target", "ActiveState")?, "active".into())?;
        same(guest.unit("node-image-finish.service", "ActiveState")?, "inactive".into())
    });
    checks.check("no unit has failed", || same(guest.ask("systemctl --failed --no-legend --plain")?, String::new()));
    checks.finish()
}
