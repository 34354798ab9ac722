//! Names of targets: the pivot target, and the target that `default.target` stands for.

use std::fs;
use std::path::Path;

use crate::search::{End, MAX_LINKS, Search};
use crate::{Problem, under};

/// The target to which a base-only boot is redirected.
pub const PIVOT_TARGET: &str = "node-image-pivot.target";

/// Name of the target in the installer's scripts; an alias of [`PIVOT_TARGET`].
const ALIAS_TARGET: &str = "node-image-overlay.target";

/// Units without which a boot to [`PIVOT_TARGET`] cannot complete.
pub const PIVOT_UNITS: [&str; 4] =
    ["node-image-pivotd.service", "node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"];

/// The target to boot to if `default.target` is missing or invalid.
pub const FALLBACK_TARGET: &str = "multi-user.target";

/// The unit that systemd boots to.
const DEFAULT: &str = "default.target";

/// The location of `default.target`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// In `/usr`, or missing. The normal output of a generator has priority over it.
    #[default]
    Vendor,
    /// In the output of another generator.
    Generator,
    /// In `/etc` or `/run`. It has priority over the normal output of a generator.
    Administrator,
}

/// The result of [`default_target`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DefaultLink {
    /// The unit that `default.target` stands for.
    pub target: DefaultTarget,
    /// The location of the link or file.
    pub origin: Origin,
}

/// The unit that `default.target` stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DefaultTarget {
    /// The unit of this name.
    Name(String),
    /// A masked unit: systemd boots to its own fallback (rescue).
    #[default]
    Masked,
}

impl DefaultTarget {
    fn fallback() -> Self {
        Self::Name(FALLBACK_TARGET.to_owned())
    }
}

/// Finds the unit that `default.target` stands for, ignoring the redirect by our generator. Returns [`FALLBACK_TARGET`] if
/// the link is missing, is a loop, or names the pivot target or an invalid unit.
pub fn default_target(units: &Search<'_>) -> DefaultLink {
    let Some(path) = units.candidates(DEFAULT).find(|path| !is_our_redirect(units.root, path)) else {
        return DefaultLink { target: DefaultTarget::fallback(), origin: Origin::Vendor };
    };
    let origin = match path.parent() {
        Some(directory) if is_generated(directory) => Origin::Generator,
        Some(directory) if directory.starts_with("/usr") => Origin::Vendor,
        _ => Origin::Administrator,
    };
    DefaultLink { target: follow(units, &path), origin }
}

/// Follows `default.target` at `path` from name to name.
fn follow(units: &Search<'_>, path: &Path) -> DefaultTarget {
    let (mut path, mut name) = (path.to_owned(), DEFAULT.to_owned());
    for _ in 0..MAX_LINKS {
        let end = units.end(&path);
        if end == End::Null || units.masks.contains(&name) {
            return DefaultTarget::Masked;
        }
        let Ok(link) = fs::read_link(under(units.root, &path)) else {
            // A file ends the chain: its name is the unit. `default.target` itself may be a file.
            return match check_name(&name) {
                Ok(()) if end == End::Empty => DefaultTarget::Masked,
                Ok(()) => DefaultTarget::Name(name),
                Err(_) => DefaultTarget::fallback(),
            };
        };
        let Some(next) = link.file_name().and_then(|next| next.to_str()) else { break };
        // systemd uses only the name of a link's target, not its directory. But a link to the same name in another
        // directory must be followed by its path.
        path = match (next == name, units.first(next)) {
            (false, Some(found)) => found,
            _ => path.parent().unwrap_or(Path::new("/")).join(&link),
        };
        next.clone_into(&mut name);
    }
    DefaultTarget::fallback()
}

fn is_generated(directory: &Path) -> bool {
    directory.to_str().is_some_and(|directory| directory.starts_with("/run/systemd/generator"))
}

/// Returns true if `path` is a generator's link to the pivot target.
fn is_our_redirect(root: &Path, path: &Path) -> bool {
    let link = fs::read_link(under(root, path)).unwrap_or_default();
    path.parent().is_some_and(is_generated) && [PIVOT_TARGET, ALIAS_TARGET].iter().any(|name| link.ends_with(name))
}

/// Checks that the agent can isolate `name` after the pivot.
///
/// # Errors
/// Fails if `name` is not a valid name of a target, or if it is the pivot target.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let valid = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    let cause = match name.strip_suffix(".target") {
        None | Some("") => "expected the name of a target, for example multi-user.target",
        Some(_) if name.len() > 255 || !name.chars().all(valid) => "expected a valid unit name",
        Some(_) if name == PIVOT_TARGET || name == ALIAS_TARGET => "expected the target to isolate after the pivot",
        Some(_) => return Ok(()),
    };
    Err(Problem(format!("invalid target \"{name}\": {cause}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::tests::root;

    #[test]
    fn default_target_is_followed_as_systemd_does() {
        let vendor = "usr/lib/systemd/system/default.target -> graphical.target";
        let name = |s: &str| DefaultTarget::Name(s.to_owned());
        for (entries, expected) in [
            (vec![], name("multi-user.target")),
            (vec![vendor], name("graphical.target")),
            (vec![vendor, "etc/systemd/system/default.target -> /usr/lib/systemd/system/a.target"], name("a.target")),
            (vec![vendor, "run/systemd/system/default.target -> b.target"], name("b.target")),
            (vec![vendor, "etc/systemd/system/default.target -> /dev/null"], DefaultTarget::Masked),
            (vec![vendor, "etc/systemd/system/default.target -> ../../../dev/null"], DefaultTarget::Masked),
            (vec![vendor, "etc/systemd/system/default.target ="], DefaultTarget::Masked),
            (vec![vendor, "etc/systemd/system/graphical.target ="], DefaultTarget::Masked),
            (vec![vendor, "run/systemd/system/graphical.target -> /dev/null"], DefaultTarget::Masked),
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
            // The pivot target by either name, a loop and invalid names.
            (vec!["etc/systemd/system/default.target -> node-image-pivot.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> node-image-overlay.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> default.target"], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> ../.."], name("multi-user.target")),
            (vec!["etc/systemd/system/default.target -> a b.target"], name("multi-user.target")),
        ] {
            let root = root(&entries);
            assert_eq!(default_target(&Search::configured(root.path(), &[])).target, expected, "{entries:?}");
        }
        let root = root(&[vendor]);
        let masks = ["graphical.target".to_owned()];
        assert_eq!(default_target(&Search::configured(root.path(), &masks)).target, DefaultTarget::Masked);
    }

    /// The agent uses the output of other generators, but not that of its own generator.
    #[test]
    fn another_generators_default_target_has_its_directorys_priority() {
        let (usr, etc) = (
            "usr/lib/systemd/system/default.target -> graphical.target",
            "etc/systemd/system/default.target -> admin.target",
        );
        let [early, normal, late] = ["generator.early", "generator", "generator.late"];
        let link = |directory: &str, to: &str| format!("run/systemd/{directory}/default.target -> {to}");
        let ours = |directory: &str| link(directory, "/usr/lib/systemd/system/node-image-pivot.target");
        let other = |directory: &str| link(directory, "other.target");
        for (entries, name, origin) in [
            (vec![], "multi-user.target", Origin::Vendor),
            (vec![usr.to_owned()], "graphical.target", Origin::Vendor),
            (vec![usr.to_owned(), ours(early)], "graphical.target", Origin::Vendor),
            (vec![usr.to_owned(), ours(normal)], "graphical.target", Origin::Vendor),
            (vec![usr.to_owned(), etc.to_owned(), ours(early)], "admin.target", Origin::Administrator),
            (vec![usr.to_owned(), other(normal)], "other.target", Origin::Generator),
            (vec![usr.to_owned(), ours(early), other(normal)], "other.target", Origin::Generator),
            (vec![usr.to_owned(), etc.to_owned(), other(normal)], "admin.target", Origin::Administrator),
            (vec![usr.to_owned(), etc.to_owned(), other(early), ours(normal)], "other.target", Origin::Generator),
            (vec![usr.to_owned(), other(late)], "graphical.target", Origin::Vendor),
            (vec![other(late)], "other.target", Origin::Generator),
        ] {
            let root = root(&entries.iter().map(String::as_str).collect::<Vec<_>>());
            let expected = DefaultLink { target: DefaultTarget::Name(name.to_owned()), origin };
            assert_eq!(default_target(&Search::complete(root.path())), expected, "{entries:?}");
        }
    }

    #[test]
    fn only_other_targets_are_valid_names() {
        assert_eq!(check_name("multi-user.target"), Ok(()));
        assert_eq!(check_name(r"a\x2db@c.target"), Ok(()));
        for bad in ["", ".target", "multi-user", "a.service", "a b.target", "a/b.target", PIVOT_TARGET, ALIAS_TARGET] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
