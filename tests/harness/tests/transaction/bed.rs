//! A container whose agent has failpoints, and the states that it may be in.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::check::{contains, etc, same, same_text};
use testbed::container::{Container, Network, Root, Setup};
use testbed::guest::{Answer, Guest};
use testbed::images::{Images, project, work_dir};
use testbed::proc::succeed;
use testbed::registry::Registry;
use testbed::scenario::node_files;

const SOON: Duration = Duration::from_secs(120);
const NODE_IMAGE_REF: &str = "/run/node-image-pivot/store/repo/refs/heads/coreos/node-image";

/// A booted container that has reached its target, with a registry in its network. Nothing is pulled yet.
pub struct Bed {
    pub guest: Container,
    _registry: Registry,
    _network: Network,
}

impl Bed {
    pub fn start(name: &str, image: &str) -> Result<Self> {
        Self::on_root(Root::Plain, name, image)
    }

    /// The same on another root.
    pub fn on_root(root: Root, name: &str, image: &str) -> Result<Self> {
        let images = Images::ensure()?;
        let network = Network::new()?;
        let registry =
            Registry::start(&images.storage, &work_dir(&format!("{name}-registry"))?, Some(network.pid()), None)?;
        let agent = agent_with_failpoints()?;
        let setup = Setup { root, ..Setup::live(name, &images.boot) };
        let guest = Container::start(images, &network, &setup, |files| {
            node_files(files, &images.image(image)?.by_digest(), "127.0.0.1", registry.port)?;
            std::fs::rename(files.root().join("etc/node-image-pivot.conf.d"), files.root().join("etc/later"))?;
            // The same program before and after the switch.
            files.put("/var/failpoints/.keep", 0o644, "")?;
            std::fs::copy(&agent, files.root().join("var/failpoints/agent"))?;
            files.put(
                "/etc/systemd/system/node-image-pivotd.service.d/failpoints.conf",
                0o644,
                "[Unit]\nStartLimitIntervalSec=0\n[Service]\nExecStart=\nExecStart=/var/failpoints/agent daemon\n\
                 Environment=NODE_IMAGE_PIVOT_FAILPOINTS=/run/failpoints\nRestart=no\n",
            )
        })?;
        guest.wait_unit("multi-user.target", "active", SOON)?;
        guest.ask("mv /etc/later /etc/node-image-pivot.conf.d; mkdir /run/failpoints")?;
        Ok(Bed { guest, _registry: registry, _network: network })
    }

    pub fn arm(&self, point: &str, action: &str) -> Result<()> {
        self.guest.ask(&format!("echo '{point} 0 {action}' >/run/failpoints/armed")).map(drop)
    }

    /// Returns true if the armed failpoint has acted.
    pub fn acted(&self) -> Result<bool> {
        Ok(self.guest.run("test -e /run/failpoints/armed")?.status != 0)
    }

    /// Runs a command of the agent that must succeed.
    pub fn agent(&self, command: &str) -> Result<String> {
        self.guest.ask(&format!("node-image-pivot {command}"))
    }

    /// Restarts the agent with a record in which the trial period is over.
    pub fn end_trial_period(&self) -> Result<()> {
        let edit = "del(.checksum) | .trial.until_boottime_ms = 1";
        self.guest
            .ask(&format!(
                "systemctl stop node-image-pivotd.service && cd /run/node-image-pivot \
                 && jq '{edit}' state.json >/run/edited && cat /run/edited >state.json \
                 && systemctl start node-image-pivotd.service"
            ))
            .map(drop)
    }

    /// Runs a command during which the agent is killed at a failpoint, and kills the command, too. Returns false if the
    /// failpoint was not reached.
    pub fn killed_in(&self, command: &str) -> Result<bool> {
        let script = format!(
            "node-image-pivot {command} >/run/asked 2>&1 & asked=$!
             while [ -e /run/failpoints/armed ] && kill -0 $asked 2>/dev/null; do sleep 0.02; done
             [ -e /run/failpoints/armed ] && exit 3
             {{ kill -9 $asked; wait $asked; }} 2>/dev/null
             ask() {{ systemctl show -p $1 --value node-image-pivotd.service 2>/dev/null; }}
             until [ \"$(ask ActiveState)\" = failed ]; do sleep 0.02; done
             ask Result"
        );
        let answer = self.guest.run(&script)?;
        if answer.status == 3 {
            return Ok(false);
        }
        same(answer.text.lines().last().unwrap_or_default().to_owned(), "signal".to_owned())?;
        Ok(true)
    }

    /// Lists all of /etc.
    pub fn etc(&self) -> Result<String> {
        etc(&self.guest)
    }

    /// Checks that /usr is of one generation, and that the record fits it.
    pub fn consistent(&self) -> Result<()> {
        let data = self.guest.ask("cat /usr/lib/base-tool/data")?;
        let tool = self.guest.ask("base-tool")?;
        same(data.replace("data of", "base-tool"), tool.clone())?;
        let step = self.step()?;
        let may_be_new = ["switching", "undoing", "switched", "refreshed", "finished"];
        if tool == "base-tool 2.0" && !may_be_new.contains(&step.as_str()) {
            bail!("/usr is the node image's, and the record says {step}");
        }
        if tool == "base-tool 1.0" && ["switched", "refreshed", "finished"].contains(&step.as_str()) {
            bail!("/usr is the bootimage's, and the record says {step}");
        }
        Ok(())
    }

    pub fn step(&self) -> Result<String> {
        self.guest.ask("jq -r '.step | if type == \"string\" then . else keys[0] end' /run/node-image-pivot/state.json 2>/dev/null || echo idle")
    }

    /// Checks that all of the system is switched.
    pub fn is_switched(&self, etc: &str) -> Result<()> {
        same(self.guest.ask("base-tool")?, "base-tool 2.0".into())?;
        same(self.guest.ask("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?, "1".into())?;
        same_text(&self.etc()?, etc)?;
        self.guest.ask("test -e /run/node-image-pivot/pivoted")?;
        self.guest.ask(&format!("test -e {NODE_IMAGE_REF}"))?;
        self.nothing_failed()
    }

    /// Checks that no part of the system is switched.
    pub fn is_as_before(&self, etc: &str) -> Result<()> {
        same(self.guest.ask("base-tool")?, "base-tool 1.0".into())?;
        same(
            self.guest.run("grep -c ' /usr .* node-image ' /proc/self/mountinfo")?.text.trim().into(),
            "0".to_owned(),
        )?;
        same_text(&self.etc()?, etc)?;
        self.guest
            .ask("test ! -e /run/node-image-pivot/pivoted && test ! -e /run/node-image-pivot/etc-undo/plan.json")?;
        self.nothing_failed()
    }

    /// Checks the same, and that the ref is removed.
    pub fn is_undone(&self, etc: &str) -> Result<()> {
        self.is_as_before(etc)?;
        self.guest.ask(&format!("test ! -e {NODE_IMAGE_REF}")).map(drop)
    }

    pub fn nothing_failed(&self) -> Result<()> {
        // The test has killed the agent. systemd may have unloaded its unit.
        self.guest.run("systemctl reset-failed node-image-pivotd.service")?;
        same(self.guest.ask("systemctl --failed --no-legend --plain")?, String::new())
    }
}

/// Builds the agent with failpoints. It is a separate program, so that no installation contains it by mistake.
///
/// The packages are those of `make check-quick`: for another set, cargo compiles them again with other features.
pub fn agent_with_failpoints() -> Result<PathBuf> {
    let build = ["build", "--release", "--quiet", "--workspace", "--exclude", "testbed", "--example", "failpoints"];
    succeed(Command::new(env!("CARGO")).args(build).current_dir(project()))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| project().join("target"), PathBuf::from);
    Ok(target.join("release/examples/failpoints"))
}

pub fn errno_words(action: &str) -> &'static str {
    if action == "eio" { "Input/output error" } else { "No space left on device" }
}

/// Checks that an error was reported: in the answer, or in the report if the agent has tolerated it.
pub fn reported(bed: &Bed, answer: &Answer, action: &str) -> Result<()> {
    let text = if answer.status == 0 { bed.agent("report")? } else { answer.text.clone() };
    contains(&text, errno_words(action)).with_context(|| format!("exit status {}", answer.status))
}
