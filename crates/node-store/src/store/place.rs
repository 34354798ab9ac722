//! RAM or disk: where the node store belongs on this system. Pure.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What the configuration says.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The disk where the system was installed to one, RAM otherwise.
    #[default]
    Auto,
    /// RAM.
    Ram,
    /// The system's repo, or nothing.
    Disk,
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "auto" => Ok(Wish::Auto),
            "ram" => Ok(Wish::Ram),
            "disk" => Ok(Wish::Disk),
            _ => Err(format!("\"{word}\" is not a store; write auto, ram or disk")),
        }
    }
}

/// The two kinds of node store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A tmpfs of its own; why, where nobody asked for it.
    Ram(Option<NoDisk>),
    /// The system's repo.
    Disk,
}

/// What is known of the booted system's repo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemRepo {
    /// Where it is, without links in the path.
    pub path: PathBuf,
    /// Whether the system says that it runs from a live medium.
    pub live: bool,
    /// Its configuration file.
    pub config: String,
    /// Type of the file system that it is on.
    pub fstype: String,
    /// What is mounted there: a device, as a rule.
    pub source: PathBuf,
    /// The file system itself is read-only, whatever the mount is.
    pub read_only: bool,
}

/// Why the system's repo cannot be the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDisk {
    /// No booted deployment.
    #[error("this system was not booted from an ostree deployment")]
    NotBooted,
    /// What is written to a live system's disk is gone with it, or never was on a disk.
    #[error("this system runs from a live medium")]
    Live,
    /// Objects of other modes are not the files of a system.
    #[error("the ostree repo {0} is not of the mode bare")]
    Mode(PathBuf),
    /// The file system is not writable.
    #[error("the file system of {0} is read-only")]
    ReadOnly(PathBuf),
    /// Not known to be on a disk.
    #[error("the ostree repo {path} is on {source_name} ({fstype}), not on a disk's ext4, xfs, btrfs or f2fs")]
    FileSystem {
        /// The repo.
        path: PathBuf,
        /// What is mounted there.
        source_name: String,
        /// Its type.
        fstype: String,
    },
}

/// File systems of installed systems: they have nameless files, hard links and attributes, and a sync
/// that means it.
const REAL: [&str; 4] = ["ext4", "xfs", "btrfs", "f2fs"];

/// Which kind of store to use. A wish for the disk is taken at its word wherever the repo can be written.
///
/// # Errors
/// The disk was asked for by name and cannot be had.
pub fn decide(wish: Wish, repo: Option<&SystemRepo>) -> Result<Kind, NoDisk> {
    match wish {
        Wish::Ram => Ok(Kind::Ram(None)),
        Wish::Auto => Ok(usable(repo).and_then(installed).map_or_else(|why| Kind::Ram(Some(why)), |()| Kind::Disk)),
        Wish::Disk => usable(repo).map(|_| Kind::Disk),
    }
}

fn usable(repo: Option<&SystemRepo>) -> Result<&SystemRepo, NoDisk> {
    let repo = repo.ok_or(NoDisk::NotBooted)?;
    if !is_bare(&repo.config) {
        return Err(NoDisk::Mode(repo.path.clone()));
    }
    if repo.read_only {
        return Err(NoDisk::ReadOnly(repo.path.clone()));
    }
    Ok(repo)
}

fn installed(repo: &SystemRepo) -> Result<(), NoDisk> {
    if repo.live {
        return Err(NoDisk::Live);
    }
    if !REAL.contains(&repo.fstype.as_str()) || !repo.source.starts_with(Path::new("/dev")) {
        return Err(NoDisk::FileSystem {
            path: repo.path.clone(),
            source_name: repo.source.display().to_string(),
            fstype: repo.fstype.clone(),
        });
    }
    Ok(())
}

/// Whether a repo's configuration says mode `bare`: the only one whose objects are the files themselves,
/// with their owners.
pub(super) fn is_bare(config: &str) -> bool {
    let mut pairs = config.lines().filter_map(|line| line.split_once('='));
    pairs.any(|(key, value)| (key.trim(), value.trim()) == ("mode", "bare"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn installed_system() -> SystemRepo {
        SystemRepo {
            path: "/sysroot/ostree/repo".into(),
            live: false,
            config: "[core]\nrepo_version=1\nmode=bare\n".into(),
            fstype: "xfs".into(),
            source: "/dev/vda4".into(),
            read_only: false,
        }
    }

    #[test]
    fn the_disk_only_where_the_system_was_installed_to_one() {
        type Change = fn(&mut SystemRepo);
        // What is different from an installed system; whether auto takes the disk, and whether it can be forced.
        let table: [(&str, Change, bool, bool); 13] = [
            ("installed", |_| {}, true, true),
            ("ext4", |repo| repo.fstype = "ext4".into(), true, true),
            ("btrfs", |repo| repo.fstype = "btrfs".into(), true, true),
            ("encrypted", |repo| repo.source = "/dev/mapper/root".into(), true, true),
            ("live marker", |repo| repo.live = true, false, true),
            ("live ISO", |repo| (repo.fstype, repo.read_only) = ("squashfs".into(), true), false, false),
            ("erofs", |repo| (repo.fstype, repo.read_only) = ("erofs".into(), true), false, false),
            ("overlay", |repo| repo.fstype = "overlay".into(), false, true),
            ("tmpfs", |repo| (repo.fstype, repo.source) = ("tmpfs".into(), "tmpfs".into()), false, true),
            ("network", |repo| (repo.fstype, repo.source) = ("nfs4".into(), "host:/x".into()), false, true),
            ("no device", |repo| repo.source = "none".into(), false, true),
            ("read-only", |repo| repo.read_only = true, false, false),
            ("bare-user", |repo| repo.config = "[core]\nmode=bare-user\n".into(), false, false),
        ];
        for (name, change, auto, forced) in table {
            let mut repo = installed_system();
            change(&mut repo);
            assert_eq!(decide(Wish::Auto, Some(&repo)) == Ok(Kind::Disk), auto, "{name}");
            assert_eq!(decide(Wish::Disk, Some(&repo)).is_ok(), forced, "{name}");
            assert_eq!(decide(Wish::Ram, Some(&repo)), Ok(Kind::Ram(None)), "{name}");
        }
        assert_eq!(decide(Wish::Auto, None), Ok(Kind::Ram(Some(NoDisk::NotBooted))));
        assert_eq!(decide(Wish::Disk, None), Err(NoDisk::NotBooted));
    }

    #[test]
    fn modes() {
        assert!(is_bare("[core]\nmode = bare\n"));
        for config in ["", "[core]\nmode=archive\n", "[core]\nmode=bare-user-only\n", "[core]\nmode\n"] {
            assert!(!is_bare(config), "{config}");
        }
    }
}
