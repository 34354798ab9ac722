//! A machine with SELinux enforcing, which boots a live medium or an installed system.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::deliver;
use testbed::guest::Guest;
use testbed::images::{Pair, work_dir};
use testbed::registry::Registry;
use testbed::scenario::node_files;
use testbed::vm::{self, Vm};

const BOOT: Duration = Duration::from_secs(300);
const KARGS: [&str; 4] = ["security=selinux", "selinux=1", "enforcing=1", "audit=1"];

/// Runs the agent in the domain of any script. That domain has all rights of root except to write labels that the loaded
/// policy lacks.
const OTHER_DOMAIN: &str =
    "[Service]\nExecStart=\nExecStart=/bin/sh -c 'exec /run/node-image-pivot/bin/node-image-pivot daemon'\n";
pub const DROP_IN: &str = "/etc/systemd/system/node-image-pivotd.service.d/50-other-domain.conf";

/// Labels the files without a label, which the initramfs brings. On a disk, files of an earlier boot keep their labels.
/// Files of the node image with labels that the loaded policy lacks look unlabelled, and cannot be given what /etc says.
const LABEL_NEW: &str = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'if [ -e /var/.labelled ]; then \
    find /etc /var -xdev -context \"*:unlabeled_t:*\" -exec restorecon -F {} + || true; \
    else restorecon -RF /etc /var; touch /var/.labelled; fi'\n";

/// Boot of a machine.
#[derive(Clone, Copy)]
pub enum Boot {
    First,
    /// The file contexts in /etc are from the merge of an earlier boot; the bootimage's policy was loaded.
    Second,
}

/// An installed system.
pub struct Installed {
    /// Directory with its kernel and initramfs.
    pub boot: PathBuf,
    pub disk: PathBuf,
    /// Kernel argument that names the deployment.
    pub deployment: String,
}

/// A machine that is on or off.
pub struct Machine {
    pub images: Pair,
    pub registry: Registry,
    pub installed: Option<Installed>,
    pub boot: Boot,
    pub on: Option<Vm>,
}

impl Machine {
    pub fn guest(&self) -> Result<&Vm> {
        self.on.as_ref().context("the machine is off")
    }

    /// Boots a live medium without the agent. The initramfs carries it, and it runs in another domain at first.
    pub fn boot_live(&mut self) -> Result<()> {
        let (stock, boot) = (&self.images.boot, work_dir("vm-selinux-boot")?);
        let packed = deliver::pack(&["initrd"], &self.images.image.by_digest(), &boot)?;
        deliver::with_initramfs(stock, &[stock.join("initramfs.img"), packed], &boot)?;
        let setup = vm::Setup { kargs: &KARGS, ..vm::Setup::live("vm-selinux", &boot) };
        let guest = Vm::start(&self.images, &setup, |files| {
            files.put(DROP_IN, 0o644, OTHER_DOMAIN)?;
            deliver::stock_files(files, self.registry.port)
        })?;
        self.on.insert(guest).wait_ssh(BOOT)
    }

    /// Boots the installed system.
    pub fn boot_disk(&mut self, name: &str, more: &str) -> Result<()> {
        let installed = self.installed.as_ref().context("no installed system")?;
        let setup = vm::Setup {
            medium: vm::Medium::Disk(&installed.disk),
            kargs: &[&KARGS[..], &[installed.deployment.trim(), more]].concat(),
            memory_mib: 2048,
            ..vm::Setup::live(name, &installed.boot)
        };
        let guest = Vm::start(&self.images, &setup, |files| {
            files.put("/etc/systemd/system/testbed-relabel.service.d/50-new.conf", 0o644, LABEL_NEW)?;
            node_files(files, &self.images.image.by_digest(), vm::HOST, self.registry.port)
        })?;
        self.on.insert(guest).wait_ssh(BOOT)
    }

    pub fn power_cut(&mut self) -> Result<()> {
        self.guest()?.ask("sync")?;
        if let Some(guest) = self.on.take() {
            guest.power_cut();
        }
        Ok(())
    }
}
