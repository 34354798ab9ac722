//! The test bed itself: each kind of guest boots and reaches what it needs. The virtual machine then becomes its node image in
//! the assisted flow.
//! `make check-one NAME=smoke`

use std::time::Duration;

use anyhow::{Context, Result};
use testbed::check::contains;
use testbed::container::{self, Container, Network};
use testbed::guest::Guest;
use testbed::images::{Images, work_dir};
use testbed::in_use::switched_in_use;
use testbed::registry::{Registry, registries_conf};
use testbed::scenario::{Before, Expected, configured_later, configured_now, node_files};
use testbed::scenarios;
use testbed::suite::Suite;
use testbed::unpivoted::boots_as_a_live_system;
use testbed::vm::{self, Vm};

const MIRROR: &str = "/etc/containers/registries.conf.d/50-testbed.conf";

#[test]
fn a_container_boots() -> Result<()> {
    let images = Images::ensure()?;
    let network = Network::new()?;
    let registry = Registry::start(&images.storage, &work_dir("smoke-registry")?, Some(network.pid()), None)?;
    let mut suite = Suite::new("container");
    let kargs = &["node-image-pivot=off"][..];
    let setup = container::Setup { kargs, ..container::Setup::live("smoke-container", &images.boot) };
    let guest = Container::start(images, &network, &setup, |files| {
        files.put(MIRROR, 0o644, &registries_conf("127.0.0.1", registry.port))
    })?;
    let mut guest = Some(guest);
    suite.run(&mut guest, &scenarios![a_container_reaches_multi_user]);
    if let Some(guest) = &guest {
        boots_as_a_live_system(&mut suite, guest, &images.boot, images.image("node-a")?);
    }
    suite.run(&mut guest, &scenarios![a_container_powers_off]);
    suite.finish()
}

fn a_container_reaches_multi_user(guest: &mut Option<Container>) -> Result<()> {
    let guest = guest.as_ref().context("the container is off")?;
    guest.wait_unit("multi-user.target", "active", Duration::from_secs(180))
}

fn a_container_powers_off(guest: &mut Option<Container>) -> Result<()> {
    guest.take().context("the container is off")?.power_off()
}

struct Machine {
    guest: Vm,
    before: Option<Before>,
}

#[test]
fn a_virtual_machine_boots() -> Result<()> {
    let images = Images::ensure()?;
    let registry = Registry::start(&images.storage, &work_dir("smoke-registry")?, None, None)?;
    let mut suite = Suite::new("virtual machine");
    let setup = vm::Setup { limit: Duration::from_secs(900), ..vm::Setup::live("smoke-vm", &images.boot) };
    let expected = Expected::node_a(images.image("node-a")?);
    let guest = Vm::start(images, &setup, |files| {
        node_files(files, &expected.image.by_digest(), vm::HOST, registry.port)?;
        configured_later(files)
    })?;
    let mut machine = Machine { guest, before: None };
    suite.run(&mut machine, &scenarios![ssh_answers]);
    boots_as_a_live_system(&mut suite, &machine.guest, &images.boot, expected.image);
    suite.run(&mut machine, &scenarios![the_console_takes_a_login, the_image_is_configured after ssh_answers]);
    let Machine { guest, before } = &machine;
    switched_in_use(&mut suite, "the_image_is_configured", guest, before.as_ref(), &expected);
    suite.finish()
}

fn ssh_answers(machine: &mut Machine) -> Result<()> {
    machine.guest.wait_ssh(Duration::from_secs(180))
}

fn the_image_is_configured(machine: &mut Machine) -> Result<()> {
    machine.before = Some(Before::of(&machine.guest)?);
    configured_now(&machine.guest)
}

fn the_console_takes_a_login(machine: &mut Machine) -> Result<()> {
    contains(&machine.guest.console_run("uname -r", Duration::from_secs(180))?, "-cloud-amd64")
}
