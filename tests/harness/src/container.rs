//! The same bootimage as a container: a real systemd as PID 1 on the real deployment, in seconds. It uses the kernel of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::disk;
use crate::files::Files;
use crate::guest::{Answer, Guest, ssh};
use crate::images::{Images, Tools, project, work_dir};
use crate::proc::{bound, end, log_to, succeed, wait_for};
use crate::registry::Registry;
use crate::scenario::node_files;

/// A network namespace with a loopback and a cable to nowhere, held open by a process.
pub struct Network {
    holder: Child,
}

impl Network {
    /// A new one.
    pub fn new() -> Result<Self> {
        // Both ends of the cable stay in here; without one, "the network is online" would never come.
        let script = "ip link set lo up && ip link add eth0 type veth peer name cable && ip link set cable up && echo up && exec sleep infinity";
        let mut holder = bound("unshare").args(["--net", "sh", "-c", script]).stdout(Stdio::piped()).spawn()?;
        let mut line = [0u8; 3];
        let out = holder.stdout.as_mut().context("no pipe")?;
        std::io::Read::read_exact(out, &mut line).context("setting up a network namespace")?;
        Ok(Network { holder })
    }

    /// The process in it.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        end(&mut self.holder);
    }
}

/// A container, the registry that it pulls from, and the network of both.
pub struct Bed {
    /// The container. It ends before the registry and the network.
    pub guest: Container,
    /// The registry.
    pub registry: Registry,
    /// The network.
    pub network: Network,
}

/// Time at which a registry begins to serve.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    /// Before the container boots.
    AtBoot,
    /// When the test resumes it.
    Later,
}

impl Bed {
    /// Boots a live system that is configured to become an image of [`Images`]. `fill` adds files to those of a node.
    pub fn boot(name: &str, image: &str, serving: Serving, fill: impl FnOnce(&Files) -> Result<()>) -> Result<Self> {
        let images = Images::ensure()?;
        Self::boot_from(&images.storage, &images.image(image)?.by_digest(), name, serving, fill)
    }

    /// Boots a live system that is configured to become an image of another storage.
    pub fn boot_from(
        storage: &Path,
        pull_spec: &str,
        name: &str,
        serving: Serving,
        fill: impl FnOnce(&Files) -> Result<()>,
    ) -> Result<Self> {
        let images = Images::ensure()?;
        let network = Network::new()?;
        let work = work_dir(&format!("{name}-registry"))?;
        let mut registry = Registry::start(storage, &work, Some(network.pid()), None)?;
        if serving == Serving::Later {
            registry.stop();
        }
        let setup = Setup::live(name, &images.boot);
        let guest = Container::start(images, &network, &setup, |files| {
            node_files(files, pull_spec, "127.0.0.1", registry.port)?;
            fill(files)
        })?;
        Ok(Bed { guest, registry, network })
    }
}

/// The mount of a container's root.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// The directory of the deployment.
    Plain,
    /// An overlay of the composefs image of the deployment.
    Composefs,
    /// An overlay of an overlay, on which the kernel accepts no other one.
    Stacked,
}

/// Description of a container.
pub struct Setup<'a> {
    /// Name of its folder.
    pub name: &'a str,
    /// A bootimage of [`Images`].
    pub boot: &'a Path,
    /// Words for /proc/cmdline and for its systemd.
    pub kargs: &'a [&'a str],
    /// The image of its disk, or `None` if it has the marker of a live medium.
    pub disk: Option<&'a Path>,
    /// The mount of its root.
    pub root: Root,
}

impl<'a> Setup<'a> {
    /// Describes a container with the marker of a live medium.
    pub fn live(name: &'a str, boot: &'a Path) -> Self {
        Self { name, boot, kargs: &[], disk: None, root: Root::Plain }
    }

    /// Describes a container of an installed system. `boot` is the directory of [`Images::disk`], `disk` a copy of its image.
    pub fn installed(name: &'a str, boot: &'a Path, disk: &'a Path) -> Self {
        Self { disk: Some(disk), ..Self::live(name, boot) }
    }
}

/// A running container; dropped, it is gone.
pub struct Container {
    work: PathBuf,
    key: PathBuf,
    network: u32,
    child: Child,
    leader: u32,
}

impl Container {
    /// Boot one in a network (which outlives it: the registry is in there).
    pub fn start(
        images: &impl AsRef<Tools>,
        network: &Network,
        setup: &Setup<'_>,
        fill: impl FnOnce(&Files) -> Result<()>,
    ) -> Result<Self> {
        let (work, key) = (work_dir(setup.name)?, images.as_ref().ssh_key.clone());
        let files = Files::new(&work)?;
        files.put("/var/roothome/.ssh/authorized_keys", 0o600, &fs::read_to_string(key.with_extension("pub"))?)?;
        files.put(
            "/etc/systemd/network/10-cable.network",
            0o644,
            "[Match]\nName=eth0\n[Network]\nAddress=192.0.2.2/24\nIPv6AcceptRA=no\n",
        )?;
        files.put(
            "/etc/systemd/network/10-cable-end.network",
            0o644,
            "[Match]\nName=cable\n[Link]\nUnmanaged=yes\n",
        )?;
        fill(&files)?;
        if let Some(disk) = setup.disk {
            disk::wait_until_detached(disk)?;
        }
        let mut command = bound("unshare");
        command
            .args(["--mount", "--propagation", "private", "--", "bash"])
            .arg(project().join("tests/bed/container.sh"));
        command.env("BOOT", setup.boot).env("WORK", work.join("mnt")).env("FILES", files.root());
        command.env("NETNS", format!("/proc/{}/ns/net", network.pid()));
        command.env("DISK", setup.disk.unwrap_or(Path::new(""))).env("CMDLINE", setup.kargs.join(" "));
        let root = match setup.root {
            Root::Plain => "plain",
            Root::Composefs => "composefs",
            Root::Stacked => "stacked",
        };
        command.env("ROOT", root);
        log_to(&mut command, &work.join("console.log"))?;
        let mut child = command.spawn().context("starting systemd-nspawn")?;
        let mut leader = None;
        let found = wait_for("PID 1 of the container", Duration::from_secs(180), || {
            leader = leader_of(child.id());
            Ok(leader.is_some() || child.try_wait()?.is_some())
        });
        let console = || fs::read_to_string(work.join("console.log")).unwrap_or_default();
        if let Err(error) = found {
            end(&mut child);
            return Err(error).with_context(console);
        }
        let leader = leader.context("systemd-nspawn ended").with_context(console)?;
        let container = Container { key, network: network.pid(), child, leader, work };
        wait_for("systemd's answer", Duration::from_secs(180), || {
            Ok(container.run("systemctl show-environment")?.status == 0)
        })
        .with_context(|| container.console())?;
        Ok(container)
    }

    /// Opens an ssh session that runs a command while the test goes on.
    pub fn open_session(&self, command: &str) -> Result<Child> {
        self.ssh(command).stdout(Stdio::piped()).spawn().context("starting ssh")
    }

    fn ssh(&self, command: &str) -> Command {
        let ssh = ssh(&self.key);
        let mut nsenter = bound("nsenter");
        nsenter
            .args(["--net", &format!("--target={}", self.network), "--"])
            .arg(ssh.get_program())
            .args(ssh.get_args());
        nsenter.args(["root@127.0.0.1", &format!("exec 2>&1; {command}")]);
        nsenter
    }

    /// Power off in the orderly way.
    pub fn power_off(mut self) -> Result<()> {
        succeed(Command::new("kill").args(["-s", "RTMIN+4", &self.leader.to_string()]))?;
        wait_for("power off", Duration::from_secs(180), || Ok(self.child.try_wait()?.is_some()))
    }
}

/// Returns the child of `pid` that is number 1 in a separate namespace.
fn leader_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().filter_map(|c| c.parse().ok()).find(|child: &u32| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        status.lines().any(|l| l.starts_with("NSpid:") && l.split_whitespace().count() > 2 && l.ends_with("\t1"))
    })
}

impl Guest for Container {
    fn run(&self, command: &str) -> Result<Answer> {
        let mut nsenter = Command::new("nsenter");
        nsenter.args([
            "--target",
            &self.leader.to_string(),
            "--all",
            "--",
            "/usr/bin/env",
            "-i",
            "HOME=/root",
            "TERM=dumb",
        ]);
        nsenter.args([
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "/bin/bash",
            "-c",
            &format!("cd /; exec 2>&1; {command}"),
        ]);
        Ok(Answer::of(&nsenter.stdin(Stdio::null()).output()?))
    }

    fn login(&self, command: &str) -> Result<Answer> {
        Ok(Answer::of(&self.ssh(command).output()?))
    }

    fn console(&self) -> String {
        fs::read_to_string(self.work.join("console.log")).unwrap_or_default()
    }

    fn registry_host(&self) -> &'static str {
        "127.0.0.1"
    }

    fn has_own_kernel(&self) -> bool {
        false
    }

    fn work(&self) -> &Path {
        &self.work
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.collect();
            // PID 1 first: with it goes everything inside.
            let _ = Command::new("kill").args(["-KILL", &self.leader.to_string()]).output();
        }
        end(&mut self.child);
        // The hierarchy of this machine has the groups that the namespace of the container made. A killed process
        // may take a moment to be gone.
        let script = "for d in /sys/fs/cgroup/unified/testbed-$0 /sys/fs/cgroup/testbed-$0; do \
                      for _ in 1 2 3 4 5 6 7 8 9 10; do \
                      [ -d $d ] || break; find $d -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1; done; done";
        let _ = Command::new("sh").args(["-c", script, &self.child.id().to_string()]).output();
    }
}
