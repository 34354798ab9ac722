//! Units on disk, as far as a generator needs them: where a unit is, and what `default.target` is.
//!
//! Only the directories that exist without generators count. The redirect itself is made in a
//! generator directory, so it is never taken for the original.

use std::fs;
use std::path::{Path, PathBuf};

use crate::under;

/// What brings up the network, its names and the time, by which certificates are valid, on the systems we know.
pub const SERVICES: [&str; 7] = [
    "NetworkManager.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "chronyd.service",
    "chrony.service",
    "systemd-timesyncd.service",
    "ntpd.service",
];

/// Where the [`SERVICES`] are enabled, depending on distribution and version.
const WANTS: [&str; 4] =
    ["multi-user.target.wants", "network-online.target.wants", "network.target.wants", "sysinit.target.wants"];

/// Where systemd looks for system units, strongest first; without generator output.
pub const LOAD_PATH: [&str; 4] =
    ["/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"];

/// The target that a base-only boot goes to first.
pub const PIVOT_TARGET: &str = "node-image-pivot.target";

/// The name that the incumbent's target had; an alias of [`PIVOT_TARGET`].
pub const ALIAS_TARGET: &str = "node-image-overlay.target";

/// What a machine boots to when nothing says otherwise.
pub const FALLBACK_TARGET: &str = "multi-user.target";

/// How many links from name to name are followed before we give up on a loop.
const MAX_LINKS: usize = 16;

/// What `default.target` stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefaultTarget {
    /// This unit.
    Name(String),
    /// It is a link to `/dev/null`: somebody wants systemd's own way out (rescue).
    Masked,
}

/// The unit file of `name` that systemd would read, as the machine sees it; `None` when there is
/// none, or when it is masked.
pub fn find(root: &Path, name: &str) -> Option<PathBuf> {
    let path = first(root, name)?;
    (fs::read_link(under(root, &path)).ok().as_deref() != Some(Path::new("/dev/null"))).then_some(path)
}

/// Those of [`SERVICES`] that exist, are not masked and are enabled.
pub fn enabled_services(root: &Path) -> Vec<&'static str> {
    // A link to /dev/null in one directory takes back the link of that name in a weaker one.
    let wanted = |name: &str| WANTS.iter().any(|wants| find(root, &format!("{wants}/{name}")).is_some());
    SERVICES.into_iter().filter(|name| wanted(name) && find(root, name).is_some()).collect()
}

/// What `default.target` is, before any redirect of ours. Missing, looping, ours or not a valid name:
/// [`FALLBACK_TARGET`].
pub fn default_target(root: &Path) -> DefaultTarget {
    let fallback = || DefaultTarget::Name(FALLBACK_TARGET.to_owned());
    let mut name = "default.target".to_owned();
    let Some(mut path) = first(root, &name) else { return fallback() };
    for _ in 0..MAX_LINKS {
        let Ok(link) = fs::read_link(under(root, &path)) else {
            // A file: the unit's own name ends the chain. `default.target` itself may be a file.
            return if check_name(&name).is_ok() { DefaultTarget::Name(name) } else { fallback() };
        };
        if link == Path::new("/dev/null") {
            return DefaultTarget::Masked;
        }
        let Some(next) = link.file_name().and_then(|n| n.to_str()) else { return fallback() };
        // Only names count for systemd, not where a link points; but a link to the same name in
        // another directory has to be followed by its path.
        path = match (next == name, first(root, next)) {
            (false, Some(found)) => found,
            _ => path.parent().unwrap_or(Path::new("/")).join(&link),
        };
        next.clone_into(&mut name);
    }
    fallback()
}

/// Whether `name` can be isolated in the end: a valid name of a target, and not our own.
/// The error completes the sentence "NAME …".
pub fn check_name(name: &str) -> Result<(), &'static str> {
    let valid = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    match name.strip_suffix(".target") {
        None | Some("") => Err("is not the name of a target, such as multi-user.target"),
        Some(_) if name.len() > 255 || !name.chars().all(valid) => Err("is not a valid unit name"),
        Some(_) if name == PIVOT_TARGET || name == ALIAS_TARGET => {
            Err("is where the pivot happens; name the target to go to after it")
        }
        Some(_) => Ok(()),
    }
}

fn first(root: &Path, name: &str) -> Option<PathBuf> {
    let candidates = LOAD_PATH.iter().map(|directory| Path::new(directory).join(name));
    candidates.into_iter().find(|path| fs::symlink_metadata(under(root, path)).is_ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A root with unit files (`path`) and links (`path -> target`).
    fn root(entries: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for entry in entries {
            let (path, link) = entry.split_once(" -> ").map_or((*entry, None), |(p, l)| (p, Some(l)));
            let place = root.path().join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            match link {
                Some(link) => symlink(link, place).unwrap(),
                None => fs::write(place, "[Unit]\n").unwrap(),
            }
        }
        root
    }

    #[test]
    fn what_default_target_is() {
        let vendor = "usr/lib/systemd/system/default.target -> graphical.target";
        let name = |s: &str| DefaultTarget::Name(s.to_owned());
        for (entries, expected) in [
            (vec![], name("multi-user.target")),
            (vec![vendor], name("graphical.target")),
            (vec![vendor, "etc/systemd/system/default.target -> /usr/lib/systemd/system/a.target"], name("a.target")),
            (vec![vendor, "run/systemd/system/default.target -> b.target"], name("b.target")),
            (vec![vendor, "etc/systemd/system/default.target -> /dev/null"], DefaultTarget::Masked),
            (vec![vendor, "etc/systemd/system/default.target"], name("default.target")),
            // An alias of an alias, as runlevel5.target is.
            (
                vec![
                    "etc/systemd/system/default.target -> /lib/systemd/system/runlevel5.target",
                    "usr/lib/systemd/system/runlevel5.target -> graphical.target",
                    "usr/lib/systemd/system/graphical.target",
                ],
                name("graphical.target"),
            ),
            // A link to the same name one directory further down.
            (
                vec![vendor, "etc/systemd/system/default.target -> /usr/lib/systemd/system/default.target"],
                name("graphical.target"),
            ),
            // Ours (by either name), a loop and nonsense are no answer.
            (vec!["etc/systemd/system/default.target -> node-image-pivot.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> node-image-overlay.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> default.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> ../.."], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> a b.target"], name("multi-user.target")),
        ] {
            assert_eq!(default_target(root(&entries).path()), expected, "{entries:?}");
        }
    }

    #[test]
    fn find_prefers_etc_and_knows_masks() {
        let tree = root(&["etc/systemd/system/a.target -> /dev/null", "usr/lib/systemd/system/a.target"]);
        assert_eq!(find(tree.path(), "a.target"), None);
        let tree = root(&["run/systemd/system/a.target", "usr/lib/systemd/system/a.target"]);
        assert_eq!(find(tree.path(), "a.target"), Some(PathBuf::from("/run/systemd/system/a.target")));
    }

    #[test]
    fn services_count_if_they_are_enabled() {
        let (time, link_to_time) = (
            "usr/lib/systemd/system/chronyd.service",
            "etc/systemd/system/multi-user.target.wants/chronyd.service -> x",
        );
        // Debian's has another name, and `chronyd.service` for an alias.
        let (debian, link_to_debian) =
            ("usr/lib/systemd/system/chrony.service", "etc/systemd/system/multi-user.target.wants/chrony.service -> x");
        let (nm, unit) = ("NetworkManager.service", "usr/lib/systemd/system/NetworkManager.service");
        let link = "etc/systemd/system/multi-user.target.wants/NetworkManager.service -> /usr/lib/systemd/system/x";
        let shipped = "usr/lib/systemd/system/sysinit.target.wants/NetworkManager.service -> ../NetworkManager.service";
        let masked = "etc/systemd/system/NetworkManager.service -> /dev/null";
        let taken_back = "etc/systemd/system/sysinit.target.wants/NetworkManager.service -> /dev/null";
        for (entries, expected) in [
            (vec![unit, link], vec![nm]),
            (vec![unit, shipped], vec![nm]),
            (vec![unit], vec![]),
            (vec![link], vec![]),
            (vec![unit, link, masked], vec![]),
            (vec![unit, shipped, taken_back], vec![]),
            (vec![unit, link, time, link_to_time], vec![nm, "chronyd.service"]),
            (vec![debian, link_to_debian], vec!["chrony.service"]),
            (vec![time], vec![]),
        ] {
            assert_eq!(enabled_services(root(&entries).path()), expected, "{entries:?}");
        }
    }

    #[test]
    fn names() {
        assert_eq!(check_name("multi-user.target"), Ok(()));
        assert_eq!(check_name(r"a\x2db@c.target"), Ok(()));
        for bad in ["", ".target", "multi-user", "a.service", "a b.target", "a/b.target", PIVOT_TARGET, ALIAS_TARGET] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
