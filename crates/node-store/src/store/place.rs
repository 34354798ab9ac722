//! The choice between the RAM store and the disk store. Pure.

use std::path::{Path, PathBuf};

use ostree::glib::{KeyFile, KeyFileFlags};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

/// Store that the configuration asks for (`store`).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case", parse_err_ty = String, parse_err_fn = unknown)]
pub enum Wish {
    /// The disk if the system is installed on one, RAM otherwise.
    #[default]
    Auto,
    /// RAM.
    Ram,
    /// The system's repo. An error if it is not writable.
    Disk,
}

fn unknown(word: &str) -> String {
    format!("unknown store \"{word}\": expected auto, ram or disk")
}

/// The kinds of node store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A dedicated tmpfs. Holds the reason if the configuration does not ask for RAM.
    Ram(Option<NoDisk>),
    /// The system's repo.
    Disk,
}

/// Properties of the booted system's repo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemRepo {
    /// Path of the repo, without links.
    pub path: PathBuf,
    /// True if the system runs from a live medium.
    pub live: bool,
    /// Content of the repo's configuration file.
    pub config: String,
    /// Type of the repo's file system.
    pub fstype: String,
    /// Source of the mount, normally a device.
    pub source: PathBuf,
    /// True if the file system is read-only, independent of the mount's options.
    pub read_only: bool,
    /// True if new objects need fs-verity, because of [`Sealing::Must`] or of the mounted root.
    pub sealed: bool,
}

/// Reason why the system's repo cannot be the node store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDisk {
    /// The system has no booted deployment.
    #[error("this system was not booted from an ostree deployment")]
    NotBooted,
    /// The system runs from a live medium, so its repo is in RAM or read-only.
    #[error("this system runs from a live medium")]
    Live,
    /// The repo has another mode than `bare`, so its objects are not the files of a system.
    #[error("the ostree repo {0} does not have the mode bare")]
    Mode(PathBuf),
    /// The system reads, or will read, only objects with fs-verity, which the node store does not enable.
    #[error(
        "objects of the ostree repo {0} have or must have fs-verity ([ex-integrity] in its configuration, or a root with \
         verity=require), which the node store does not enable"
    )]
    Sealed(PathBuf),
    /// The file system is not writable.
    #[error("the file system of {0} is read-only")]
    ReadOnly(PathBuf),
    /// The file system is not one of [`DISK_FILE_SYSTEMS`] on a block device.
    #[error(
        "the ostree repo {path} is on {source_name} ({fstype}): expected ext4, xfs, btrfs or f2fs on a block device"
    )]
    FileSystem {
        /// Path of the repo.
        path: PathBuf,
        /// Source of the mount.
        source_name: String,
        /// Type of the file system.
        fstype: String,
    },
}

/// File systems of installed systems: they support `O_TMPFILE`, hard links and extended attributes, and report failed
/// writes to syncfs(2).
const DISK_FILE_SYSTEMS: [&str; 4] = ["ext4", "xfs", "btrfs", "f2fs"];

/// Selects the kind of store. [`Wish::Disk`] is followed wherever the repo is writable.
///
/// # Errors
/// The configuration asks for the disk, and the repo is not usable.
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
    if repo.sealed {
        return Err(NoDisk::Sealed(repo.path.clone()));
    }
    Ok(repo)
}

fn installed(repo: &SystemRepo) -> Result<(), NoDisk> {
    if repo.live {
        return Err(NoDisk::Live);
    }
    if !DISK_FILE_SYSTEMS.contains(&repo.fstype.as_str()) || !repo.source.starts_with(Path::new("/dev")) {
        return Err(NoDisk::FileSystem {
            path: repo.path.clone(),
            source_name: repo.source.display().to_string(),
            fstype: repo.fstype.clone(),
        });
    }
    Ok(())
}

/// Demand of a repo for fs-verity of its new objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// None.
    No,
    /// Wanted where the file system supports it.
    Try,
    /// Needed: the system reads, or will read, no other objects.
    Must,
}

/// Returns the demand that the configuration of a repo states. `has_sealed` returns true if an existing object has
/// fs-verity. That decides if the configuration leaves the choice to the file system.
///
/// Keys: `[ex-integrity]` `fsverity` and `composefs` of ostree.repo-config(5), of which the second one implies
/// `fsverity=maybe`; and those of earlier releases, `[ex-fsverity]` `required` and `opportunistic`.
pub fn sealing(config: &str, has_sealed: impl FnOnce() -> bool) -> Sealing {
    let file = KeyFile::new();
    let loaded = file.load_from_data(config, KeyFileFlags::NONE).is_ok();
    let word = |section, key| file.string(section, key).ok().filter(|_| loaded);
    let is = |section, key, words: &[&str]| word(section, key).is_some_and(|word| words.contains(&word.as_str()));
    const NEW: &str = "ex-integrity";
    const OLD: &str = "ex-fsverity";
    const YES: [&str; 3] = ["yes", "true", "1"];
    const NO: [&str; 3] = ["no", "false", "0"];
    let composefs = word(NEW, "composefs").is_some() && !is(NEW, "composefs", &NO);
    let asks = word(NEW, "fsverity").map_or(composefs, |_| !is(NEW, "fsverity", &NO));
    if is(NEW, "fsverity", &YES) || !asks && is(OLD, "required", &YES) {
        return Sealing::Must;
    }
    match asks || is(OLD, "opportunistic", &YES) {
        true if has_sealed() => Sealing::Must,
        true => Sealing::Try,
        false => Sealing::No,
    }
}

/// Returns true if a regular file among the objects of `repo` has fs-verity. Looks at one file of each directory: a repo may
/// have sealed and other files, because `deploy` seals only those of its image.
pub fn has_sealed_object(repo: &Path) -> bool {
    sample(repo).any(|file| is_sealed(&file))
}

/// Returns a regular file of each directory with objects.
fn sample(repo: &Path) -> impl Iterator<Item = PathBuf> {
    let directories = (0..=u8::MAX).map(|prefix| repo.join("objects").join(hex::encode([prefix])));
    directories.filter_map(|directory| {
        let mut entries = std::fs::read_dir(directory).ok()?.flatten();
        let file = entries.find(|entry| {
            entry.path().extension().is_some_and(|kind| kind == "file")
                && entry.file_type().is_ok_and(|kind| kind.is_file())
        });
        file.map(|file| file.path())
    })
}

/// Returns true if a file has fs-verity.
pub fn is_sealed(path: &Path) -> bool {
    statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::VERITY))
}

/// Returns true if a repo's configuration sets the mode `bare`, the only one whose objects are the files themselves, with
/// their owners.
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
            sealed: false,
        }
    }

    #[test]
    fn auto_selects_the_disk_only_on_an_installed_system() {
        type Change = fn(&mut SystemRepo);
        // Difference from an installed system, true if auto selects the disk, true if "disk" is accepted.
        let table: [(&str, Change, bool, bool); 14] = [
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
            ("sealed", |repo| repo.sealed = true, false, false),
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
    fn the_configuration_of_the_repo_asks_for_fs_verity() {
        use Sealing::{Must, No, Try};
        // Two sections, and the demand without and with a sealed object.
        for (new, old, unsealed, sealed) in [
            ("", "", No, No),
            ("fsverity=yes", "", Must, Must),
            ("fsverity=true", "", Must, Must),
            ("fsverity=maybe", "", Try, Must),
            ("fsverity=no", "", No, No),
            ("composefs=yes", "", Try, Must),
            ("composefs=no", "", No, No),
            ("composefs=yes\nfsverity=no", "", No, No),
            ("", "required=true", Must, Must),
            ("", "opportunistic=true", Try, Must),
            ("fsverity=no", "required=true", Must, Must),
            ("fsverity=maybe", "required=true", Try, Must),
        ] {
            let config = format!("[core]\nmode=bare\n[ex-integrity]\n{new}\n[ex-fsverity]\n{old}\n");
            for (has_sealed, expected) in [(false, unsealed), (true, sealed)] {
                assert_eq!(sealing(&config, || has_sealed), expected, "{new} {old} {has_sealed}");
            }
        }
        assert_eq!(sealing("[core]\nfsverity=yes\n", || true), No, "another section");
        assert_eq!(sealing("not a key file", || true), No);
        let temp = tempfile::tempdir().unwrap();
        assert!(!has_sealed_object(temp.path()));
        std::fs::create_dir_all(temp.path().join("objects/ab")).unwrap();
        std::fs::write(temp.path().join("objects/ab/cd.file"), "x").unwrap();
        assert!(!has_sealed_object(temp.path()));
    }

    #[test]
    fn a_file_of_each_directory_is_looked_at() {
        let temp = tempfile::tempdir().unwrap();
        let objects = temp.path().join("objects");
        for directory in ["00", "7f", "ab", "ff"] {
            std::fs::create_dir_all(objects.join(directory)).unwrap();
        }
        for file in ["00/a.file", "00/b.file", "7f/a.dirtree", "7f/b.file", "ab/a.commit", "ff/b.file"] {
            std::fs::write(objects.join(file), "x").unwrap();
        }
        std::os::unix::fs::symlink("b.file", objects.join("ff/a.file")).unwrap();
        let found: Vec<PathBuf> = sample(temp.path()).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with(objects.join("00")), "{found:?}");
        assert_eq!(found[1..], [objects.join("7f/b.file"), objects.join("ff/b.file")]);
    }

    #[test]
    fn only_the_mode_bare_is_bare() {
        assert!(is_bare("[core]\nmode = bare\n"));
        for config in ["", "[core]\nmode=archive\n", "[core]\nmode=bare-user-only\n", "[core]\nmode\n"] {
            assert!(!is_bare(config), "{config}");
        }
    }
}
