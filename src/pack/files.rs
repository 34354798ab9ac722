//! The files of the agent and their destinations in a root that does not have it.

use super::entry::{Node, Tree};
use super::{GENERATOR, Parts};
use crate::config::AUTH_CREDENTIAL;

/// The units, by file name.
const UNITS: [(&str, &str); 5] = [
    ("node-image-finish.service", include_str!("../../units/node-image-finish.service")),
    ("node-image-overlay.service", include_str!("../../units/node-image-overlay.service")),
    ("node-image-pivot.target", include_str!("../../units/node-image-pivot.target")),
    ("node-image-pivotd.service", include_str!("../../units/node-image-pivotd.service")),
    ("node-image-pull.service", include_str!("../../units/node-image-pull.service")),
];

/// The policy modules for SELinux, by file name.
const MODULES: [(&str, &str); 2] = [
    ("node-image-pivot-domain.cil", include_str!("../../packaging/selinux/node-image-pivot-domain.cil")),
    ("node-image-pivot.cil", include_str!("../../packaging/selinux/node-image-pivot.cil")),
];

/// File name of the D-Bus policy.
pub const BUS_POLICY_NAME: &str = "org.nodeimage.Pivot1.conf";
const BUS_POLICY: &str = include_str!("../../packaging/dbus/org.nodeimage.Pivot1.conf");

/// Directories of a root, without a leading slash.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub programs: &'static str,
    pub units: &'static str,
    pub generators: &'static str,
    pub config: &'static str,
    pub credentials: &'static str,
    pub bus_policy: &'static str,
    pub modules: &'static str,
}

/// Below `/run`, where an initramfs puts them.
pub const RUN: Place = Place {
    programs: "run/node-image-pivot/bin",
    units: "run/systemd/system",
    generators: "run/node-image-pivot/bin",
    config: "run/node-image-pivot.conf.d",
    credentials: "run/credstore",
    bus_policy: "run/node-image-pivot/dbus",
    modules: "run/node-image-pivot/selinux",
};

/// Below `/etc` and `/var`, which Ignition may write. Uses `/var/usrlocal`, the target of `/usr/local`, because a node
/// image cannot replace it.
pub const ETC: Place = Place {
    programs: "var/usrlocal/bin",
    units: "etc/systemd/system",
    generators: "etc/systemd/system-generators",
    config: "etc/node-image-pivot.conf.d",
    credentials: "etc/credstore",
    bus_policy: "etc/dbus-1/system.d",
    modules: "var/usrlocal/share/selinux/packages",
};

impl Place {
    /// Returns the path of the agent's program, without a leading slash.
    pub fn agent(&self) -> String {
        format!("{}/node-image-pivot", self.programs)
    }

    /// Returns the path of the generator, likewise.
    pub fn generator(&self) -> String {
        format!("{}/{GENERATOR}", self.generators)
    }

    /// Returns the two programs.
    pub fn programs<'a>(&self, parts: &'a Parts) -> Tree<'a> {
        Tree::from([(self.agent(), Node::program(&parts.agent)), (self.generator(), Node::program(&parts.generator))])
    }

    /// Returns the configuration and the credentials.
    pub fn settings<'a>(&self, parts: &'a Parts) -> Tree<'a> {
        let config = parts.config.iter().map(|(name, text)| (format!("{}/{name}", self.config), Node::text(text)));
        let auth = parts.auth.iter().flat_map(|auth| {
            let file = format!("{}/{AUTH_CREDENTIAL}", self.credentials);
            [(self.credentials.to_owned(), Node::Directory { mode: 0o700 }), (file, Node::secret(auth))]
        });
        config.chain(auth).collect()
    }

    /// Returns the units, which start the agent in this place, and the policies.
    pub fn units(&self) -> Tree<'static> {
        let agent = format!("/{}", self.agent());
        let units = UNITS.map(|(name, text)| (format!("{}/{name}", self.units), Node::text(moved(text, &agent))));
        let modules = MODULES.map(|(name, text)| (format!("{}/{name}", self.modules), Node::text(text)));
        let alias = Node::Link("node-image-pivot.target".to_owned());
        let others = [
            (format!("{}/node-image-overlay.target", self.units), alias),
            (format!("{}/{BUS_POLICY_NAME}", self.bus_policy), Node::text(BUS_POLICY)),
        ];
        units.into_iter().chain(modules).chain(others).collect()
    }
}

/// Returns a unit that starts the program `agent` instead of the installed one.
///
/// The SELinux policy has no label for the program there, and the label selects the domain of the daemon.
fn moved(unit: &str, agent: &str) -> String {
    let label =
        format!("ExecStartPre=-/bin/sh -c '[ ! -e /sys/fs/selinux/enforce ] || chcon -t install_exec_t {agent}'");
    let mut text = String::with_capacity(unit.len() + label.len());
    for line in unit.lines() {
        if let Some(arguments) = line.strip_prefix("ExecStart=/usr/bin/node-image-pivot ") {
            if arguments == "daemon" {
                text.extend([&label, "\n"]);
            }
            text.extend(["ExecStart=", agent, " ", arguments, "\n"]);
        } else {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moved_units_start_the_packed_program() {
        for (name, text) in UNITS.iter().filter(|(name, _)| name.ends_with(".service")) {
            let text = moved(text, "/x/agent");
            let commands: Vec<_> = text.lines().filter(|line| line.starts_with("Exec")).collect();
            assert!(!text.contains("/usr/bin/node-image-pivot"), "{name}");
            match *name {
                "node-image-pivotd.service" => {
                    assert!(commands[0].starts_with("ExecStartPre=-") && commands[0].ends_with("_t /x/agent'"));
                    assert_eq!(commands[1..], ["ExecStart=/x/agent daemon"]);
                }
                _ => assert!(matches!(commands[..], [one] if one.starts_with("ExecStart=/x/agent ")), "{commands:?}"),
            }
        }
    }
}
