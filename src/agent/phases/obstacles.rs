//! Checks the preconditions of an undo before its first act.

use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;

use crate::agent::new_usr::{ETC, USR, USR_SOURCE};
use overlay_root::{Exposure, Mount, Namespace};

/// A state of the machine in which an undo must not begin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::agent) enum Obstacle {
    /// Another mount covers the node image's `/usr`.
    #[error("{name} ({fstype}) is mounted over /usr; unmount it (umount /usr; systemd-sysext unmerge for extensions)")]
    Covered {
        /// Source in the mount table.
        name: String,
        /// Its file system.
        fstype: String,
    },
    /// Mounts that the removal of the node image's `/usr` would remove, too.
    #[error("{} mounted below /usr since the switch; unmount first", list(.0))]
    MountedBelow(Vec<PathBuf>),
    /// `/etc` is read-only, so no file can be restored.
    #[error("/etc is mounted read-only; make it writable")]
    EtcReadOnly,
    /// The mount table cannot be read.
    #[error("{0}")]
    Unknown(String),
}

/// The treatment of mounts below the node image's `/usr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::agent) enum Below {
    /// Refuse, so that the undo of an administrator does not unmount them unexpectedly.
    Refuse,
    /// The trial period is over, or an undo has begun: unmount them and report it.
    Unmount,
}

/// Returns all obstacles on this machine. Changes nothing.
pub(in crate::agent) fn obstacles(below: Below) -> Vec<Obstacle> {
    let mut found = match Namespace::init().mounts() {
        Ok(mounts) => on_mounts(&mounts, below),
        Err(error) => vec![Obstacle::Unknown(format!("{error:#}"))],
    };
    if rustix::fs::statvfs(ETC).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        found.push(Obstacle::EtcReadOnly);
    }
    found
}

fn on_mounts(mounts: &[Mount], below: Below) -> Vec<Obstacle> {
    let usr = Path::new(USR);
    let over =
        overlay_root::top(mounts, usr).filter(|_| overlay_root::exposure(mounts, usr, USR_SOURCE) == Exposure::Covered);
    if let Some(over) = over {
        let name = over.source.to_string_lossy().into_owned();
        return vec![Obstacle::Covered { name, fstype: over.fstype.clone() }];
    }
    let on = overlay_root::mounted_on(mounts, usr, USR_SOURCE);
    if on.is_empty() || below == Below::Unmount { Vec::new() } else { vec![Obstacle::MountedBelow(on)] }
}

/// Joins obstacles to one message.
pub(in crate::agent) fn message(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn list(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    format!("{} {}", names.join(", "), if names.len() == 1 { "is" } else { "are" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_undo_begins_only_without_obstacles() {
        const BASE: &str = "22 1 7:0 / / ro - squashfs x ro\n23 22 7:0 /usr /usr ro - squashfs x ro\n";
        const OURS: &str = "60 23 0:60 / /usr ro - overlay node-image ro\n";
        const SYSEXT: &str = "61 60 0:61 / /usr ro - overlay sysext ro\n";
        const BIND: &str = "62 60 8:1 / /usr/share/misc rw - ext4 /dev/sda rw\n";
        const HIDDEN: &str = "63 23 8:1 / /usr/share/oem rw - ext4 /dev/sda rw\n";
        let covered = || vec![Obstacle::Covered { name: "sysext".into(), fstype: "overlay".into() }];
        let mounted = || vec![Obstacle::MountedBelow(vec!["/usr/share/misc".into()])];
        let cases: [(&[&str], Vec<Obstacle>, Vec<Obstacle>); 6] = [
            (&[], vec![], vec![]),
            (&[OURS], vec![], vec![]),
            (&[OURS, HIDDEN], vec![], vec![]),
            (&[OURS, BIND], mounted(), vec![]),
            (&[OURS, SYSEXT], covered(), covered()),
            (&[OURS, BIND, SYSEXT], covered(), covered()),
        ];
        for (lines, refuse, unmount) in cases {
            let mounts = overlay_root::parse(format!("{BASE}{}", lines.concat()).as_bytes());
            assert_eq!(on_mounts(&mounts, Below::Refuse), refuse, "{lines:?}");
            assert_eq!(on_mounts(&mounts, Below::Unmount), unmount, "{lines:?}");
        }
        let text = message(&on_mounts(&overlay_root::parse(format!("{BASE}{OURS}{SYSEXT}").as_bytes()), Below::Refuse));
        assert!(text.starts_with("sysext (overlay) is mounted over /usr") && text.contains("unmerge"), "{text}");
    }
}
