//! The bed itself, without the agent: what boots, and what the guest can reach.

use std::time::Duration;

use anyhow::Result;
use testbed::check::{Checks, contains, same};
use testbed::container::{self, Container, Network};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::registry::{Registry, registries_conf};
use testbed::vm::{self, Vm};

fn live_root(guest: &dyn Guest, images: &Images, checks: &mut Checks) -> Result<()> {
    checks.check("systemd is content", || {
        same(guest.ask("systemctl is-system-running --wait || systemctl --failed")?, "running".into())
    });
    checks.check("libostree knows the booted deployment", || {
        let commit = std::fs::read_to_string(images.boot.join("commit"))?;
        contains(&guest.ask("ostree admin status")?, &format!("* testbed {}", commit.trim()))
    });
    checks.check("/usr cannot be written, /etc and /var can", || {
        same(guest.run("touch /usr/x")?.status, 1)?;
        same(guest.ask("touch /etc/x /var/x && echo yes")?, "yes".into())
    });
    checks.check("it is live", || guest.ask("test -e /run/ostree-live -a -e /run/ostree-booted").map(drop));
    checks.check("a new ssh login works", || same(guest.login("echo in")?.text.trim().to_string(), "in".into()));
    checks.check("skopeo finds a node image through the mirror", || {
        contains(
            &guest.ask(&format!("skopeo inspect --no-tags docker://{}", images.image("node-a")?.by_tag()))?,
            "ostree.final-diffid",
        )
    });
    Ok(())
}

#[test]
fn container_boots() -> Result<()> {
    let images = Images::ensure()?;
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("smoke-registry")?, Some(network.pid()), None)?;
    let mut checks = Checks::new("container");
    let setup =
        container::Setup { name: "smoke-container", boot: &images.boot, kargs: &["node-image-pivot=off"], live: true };
    let guest = Container::start(images, &network, &setup, |files| {
        files.put(
            "/etc/containers/registries.conf.d/50-testbed.conf",
            0o644,
            &registries_conf("127.0.0.1", registry.port),
        )
    })?;
    checks.check("multi-user is reached", || guest.wait_unit("multi-user.target", "active", Duration::from_secs(60)));
    live_root(&guest, images, &mut checks)?;
    checks.check("it powers off", || guest.power_off());
    checks.finish()
}

#[test]
fn vm_boots() -> Result<()> {
    let images = Images::ensure()?;
    let registry = Registry::start(&images.storage, &work_dir("smoke-registry")?, None, None)?;
    let mut checks = Checks::new("virtual machine");
    let setup = vm::Setup {
        name: "smoke-vm",
        boot: &images.boot,
        disk: None,
        kargs: &["node-image-pivot=off"],
        memory_mib: 3072,
        cpu: vm::CPU,
        limit: Duration::from_secs(240),
    };
    let guest = Vm::start(images, &setup, |files| {
        files.put("/etc/containers/registries.conf.d/50-testbed.conf", 0o644, &registries_conf(vm::HOST, registry.port))
    })?;
    checks.check("ssh answers", || guest.wait_ssh(Duration::from_secs(150)));
    live_root(&guest, images, &mut checks)?;
    checks.check("the console takes a login", || {
        contains(&guest.console_run("uname -r", Duration::from_secs(60))?, "-cloud-amd64")
    });
    checks.finish()
}
