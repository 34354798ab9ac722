//! The tree that an initramfs needs to carry the agent into the real root.
//!
//! A unit below `/etc/systemd/system`, which every systemd reads, runs `carry.sh`. Its directories exist as directories
//! in every initramfs. That matters: the kernel replaces a link such as `/lib` by a directory of that name in an archive.

use super::entry::{Node, Tree, with_parents};
use super::files::{BUS_POLICY_NAME, ETC, RUN};
use super::{GENERATOR, Parts};

const SCRIPT: &str = include_str!("../../initramfs/carry.sh");
const UNIT: &str = include_str!("../../initramfs/node-image-pivot-carry.service");
const UNIT_NAME: &str = "node-image-pivot-carry.service";
/// Directory of the script and of the carried files.
const OURS: &str = "usr/lib/node-image-pivot";

/// Returns the tree for the initramfs. Each directory below `carry` is one step of `carry.sh`; paths in it are relative
/// to `/run`.
pub fn initramfs(parts: &Parts) -> Tree<'_> {
    // A link, as policies for SELinux let systemd execute a file with the label of `/run/node-image-pivot`.
    let generator = format!("../../{}", RUN.generator().trim_start_matches("run/"));
    let steps = [
        ("settings", RUN.settings(parts)),
        ("agent", RUN.programs(parts)),
        ("units", RUN.units()),
        ("live", Tree::from([("run/tmpfiles.d/node-image-pivot.conf".to_owned(), Node::text(live()))])),
        ("generator", Tree::from([(format!("run/systemd/system-generators/{GENERATOR}"), Node::Link(generator))])),
    ];
    let carried = steps.into_iter().flat_map(|(step, tree)| {
        tree.into_iter()
            .map(move |(path, node)| (format!("{OURS}/carry/{step}/{}", path.trim_start_matches("run/")), node))
    });
    let wanted_by = format!("etc/systemd/system/initrd.target.wants/{UNIT_NAME}");
    let own = [
        (format!("{OURS}/carry.sh"), Node::text(SCRIPT)),
        (format!("etc/systemd/system/{UNIT_NAME}"), Node::text(UNIT)),
        (wanted_by, Node::Link(format!("../{UNIT_NAME}"))),
    ];
    with_parents(carried.chain(own).collect())
}

/// Returns lines for systemd-tmpfiles that make a live system complete: the command in the search path, and the D-Bus
/// policy where the bus reads it.
fn live() -> String {
    format!(
        "# Carried by the initramfs. The live system discards /etc and /var at its end.\n\
         L /{} - - - - /{}\n\
         C /{}/{BUS_POLICY_NAME} - - - - /{}/{BUS_POLICY_NAME}\n",
        ETC.agent(),
        RUN.agent(),
        ETC.bus_policy,
        RUN.bus_policy,
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listed(parts: &Parts) -> Vec<String> {
        let line = |(path, node): (String, Node<'_>)| match node {
            Node::Directory { mode } => format!("{path}/ {mode:o}"),
            Node::File { mode, .. } => format!("{path} {mode:o}"),
            Node::Link(target) => format!("{path} -> {target}"),
        };
        initramfs(parts).into_iter().map(line).collect()
    }

    #[test]
    fn the_entries_follow_from_the_parts() {
        let common = listed(&Parts::example(&[], None));
        let expected = [
            "etc/ 755",
            "etc/systemd/ 755",
            "etc/systemd/system/ 755",
            "etc/systemd/system/initrd.target.wants/ 755",
            "etc/systemd/system/initrd.target.wants/node-image-pivot-carry.service -> ../node-image-pivot-carry.service",
            "etc/systemd/system/node-image-pivot-carry.service 644",
            "usr/ 755",
            "usr/lib/ 755",
            "usr/lib/node-image-pivot/ 755",
            "usr/lib/node-image-pivot/carry/ 755",
            "usr/lib/node-image-pivot/carry.sh 644",
            "usr/lib/node-image-pivot/carry/agent/ 755",
            "usr/lib/node-image-pivot/carry/agent/node-image-pivot/ 755",
            "usr/lib/node-image-pivot/carry/agent/node-image-pivot/bin/ 755",
            "usr/lib/node-image-pivot/carry/agent/node-image-pivot/bin/node-image-pivot 755",
            "usr/lib/node-image-pivot/carry/agent/node-image-pivot/bin/node-image-pivot-generator 755",
            "usr/lib/node-image-pivot/carry/generator/ 755",
            "usr/lib/node-image-pivot/carry/generator/systemd/ 755",
            "usr/lib/node-image-pivot/carry/generator/systemd/system-generators/ 755",
            "usr/lib/node-image-pivot/carry/generator/systemd/system-generators/node-image-pivot-generator -> \
             ../../node-image-pivot/bin/node-image-pivot-generator",
            "usr/lib/node-image-pivot/carry/live/ 755",
            "usr/lib/node-image-pivot/carry/live/tmpfiles.d/ 755",
            "usr/lib/node-image-pivot/carry/live/tmpfiles.d/node-image-pivot.conf 644",
            "usr/lib/node-image-pivot/carry/units/ 755",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/ 755",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/dbus/ 755",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/dbus/org.nodeimage.Pivot1.conf 644",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/selinux/ 755",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/selinux/node-image-pivot-domain.cil 644",
            "usr/lib/node-image-pivot/carry/units/node-image-pivot/selinux/node-image-pivot.cil 644",
            "usr/lib/node-image-pivot/carry/units/systemd/ 755",
            "usr/lib/node-image-pivot/carry/units/systemd/system/ 755",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-finish.service 644",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-overlay.service 644",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-overlay.target -> node-image-pivot.target",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-pivot.target 644",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-pivotd.service 644",
            "usr/lib/node-image-pivot/carry/units/systemd/system/node-image-pull.service 644",
        ];
        assert_eq!(common, expected);

        let settings = "usr/lib/node-image-pivot/carry/settings";
        let more = [("50-image.toml", "")];
        let table = [
            (
                Parts::example(&more, None),
                vec!["/ 755", "/node-image-pivot.conf.d/ 755", "/node-image-pivot.conf.d/50-image.toml 644"],
            ),
            (Parts::example(&[], Some("{}")), vec!["/ 755", "/credstore/ 700", "/credstore/node-image-pivot.auth 600"]),
        ];
        for (parts, expected) in table {
            let added: Vec<_> = listed(&parts).into_iter().filter(|line| !common.contains(line)).collect();
            assert_eq!(added, expected.iter().map(|end| format!("{settings}{end}")).collect::<Vec<_>>());
        }
    }

    #[test]
    fn directories_come_before_their_entries() {
        let parts = Parts::example(&[("a.toml", "")], Some("{}"));
        let paths: Vec<_> = initramfs(&parts).into_keys().collect();
        for (at, path) in paths.iter().enumerate() {
            let Some((parent, _)) = path.rsplit_once('/') else { continue };
            assert!(paths[..at].iter().any(|earlier| earlier == parent), "{path}");
        }
    }
}
