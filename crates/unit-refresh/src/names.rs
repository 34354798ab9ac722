//! Unit names: templates and instances, the directories that belong to a name, aliases, specifiers. Pure.
//!
//! Source of the rules: systemd.unit(5), and the debug output of `systemd-analyze verify` of systemd 252.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Returns the name of the unit of a mount at the absolute path `target`, as `systemd-escape --path --suffix=mount` does.
#[must_use]
pub fn mount_unit(target: &Path) -> String {
    let path = target.as_os_str().as_bytes();
    let path = path.strip_prefix(b"/").filter(|rest| !rest.is_empty()).unwrap_or(path);
    let escape = |(at, byte): (usize, &u8)| match byte {
        b'/' => "-".to_owned(),
        b'.' if at == 0 => "\\x2e".to_owned(),
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => char::from(*byte).to_string(),
        other => format!("\\x{other:02x}"),
    };
    path.iter().enumerate().map(escape).chain([".mount".to_owned()]).collect()
}

/// The three kinds of unit names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind<'a> {
    /// `ssh.service`.
    Plain,
    /// `getty@.service`.
    Template,
    /// `getty@tty1.service`, with its instance.
    Instance(&'a str),
}

/// Splits `getty@tty1.service` into `("getty", "tty1", "service")`; `None` for a name without `@`.
pub(super) fn template_of(name: &str) -> Option<(&str, &str, &str)> {
    let (stem, rest) = name.split_once('@')?;
    let (instance, suffix) = rest.rsplit_once('.')?;
    Some((stem, instance, suffix))
}

fn kind(name: &str) -> Kind<'_> {
    match template_of(name) {
        None => Kind::Plain,
        Some((_, "", _)) => Kind::Template,
        Some((_, instance, _)) => Kind::Instance(instance),
    }
}

/// Returns the template of an instance: `getty@.service` for `getty@tty1.service`.
pub(super) fn template(name: &str) -> Option<String> {
    let (stem, _, suffix) = template_of(name).filter(|(_, instance, _)| !instance.is_empty())?;
    Some(format!("{stem}@.{suffix}"))
}

/// Returns `name` with the instance of `of` if `name` is a template and `of` an instance, or else `name` unchanged.
pub(super) fn with_instance(name: &str, of: &str) -> String {
    match (template_of(name), kind(of)) {
        (Some((stem, "", suffix)), Kind::Instance(instance)) => format!("{stem}@{instance}.{suffix}"),
        _ => name.to_owned(),
    }
}

/// Returns true if systemd accepts a link called `link` as an alias of `target`.
pub(super) fn is_alias(link: &str, target: &str) -> bool {
    let same_suffix = match (link.rsplit_once('.'), target.rsplit_once('.')) {
        (Some((_, ours)), Some((_, theirs))) => ours == theirs,
        _ => false,
    };
    let kinds = match (kind(link), kind(target)) {
        (Kind::Plain, Kind::Plain | Kind::Instance(_))
        | (Kind::Template, Kind::Template)
        | (Kind::Instance(_), Kind::Template) => true,
        (Kind::Instance(ours), Kind::Instance(theirs)) => ours == theirs,
        _ => false,
    };
    same_suffix && kinds && link != target
}

/// Returns the names whose `.d`, `.wants` and `.requires` directories belong to `name`, the most specific first: itself,
/// its template, and the prefixes of both that end in a dash.
pub(super) fn folders(name: &str) -> Vec<String> {
    let mut found = vec![name.to_owned()];
    found.extend(template(name).iter().flat_map(|template| folders(template)));
    found.extend(dashed(name).iter().flat_map(|prefix| folders(prefix)));
    found
}

/// Returns the next shorter prefix that ends in a dash: `foo-.service` for `foo-bar.service`, `foo-@x.service` for
/// `foo-bar@x.service`. The prefix of a template has no `@`.
fn dashed(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let (stem, instance) = stem.split_once('@').unwrap_or((stem, ""));
    let at = stem.strip_suffix('-').unwrap_or(stem).rfind('-')?;
    let separator = if instance.is_empty() { "" } else { "@" };
    Some(format!("{}{separator}{instance}.{suffix}", &stem[..=at]))
}

/// Resolves a name in a dependency of `unit`: first the specifiers, then a template, which gets the instance of `unit`, or
/// its prefix if `unit` is not an instance. Returns `None` for a specifier that depends on the machine or that systemd
/// does not accept here.
pub(super) fn dependency(name: &str, unit: &str) -> Option<String> {
    let stem = unit.rsplit_once('.').map_or(unit, |(stem, _)| stem);
    let (prefix, instance) = stem.split_once('@').unwrap_or((stem, ""));
    let mut resolved = String::new();
    let mut letters = name.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '%' => resolved.push_str(match letters.next()? {
                'n' => unit,
                'N' => stem,
                'p' => prefix,
                'i' => instance,
                'j' => prefix.rsplit('-').next()?,
                '%' => "%",
                _ => return None,
            }),
            letter => resolved.push(letter),
        }
    }
    Some(match (template_of(&resolved), instance) {
        (Some((stem, "", suffix)), "") => format!("{stem}@{prefix}.{suffix}"),
        _ => with_instance(&resolved, unit),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names are those that systemd-escape of systemd 252 prints.
    #[test]
    fn a_mount_point_is_escaped_as_systemd_does() {
        for (target, unit) in [
            ("/", "-.mount"),
            ("/boot", "boot.mount"),
            ("/run/credentials/a-b.service", r"run-credentials-a\x2db.service.mount"),
            ("/a b/ü", r"a\x20b-\xc3\xbc.mount"),
            ("/.x/.y", r"\x2ex-.y.mount"),
        ] {
            assert_eq!(mount_unit(Path::new(target)), unit);
        }
    }

    #[test]
    fn directories_of_a_name_are_in_systemds_order() {
        for (name, expected) in [
            ("a.service", &["a.service"] as &[&str]),
            ("a-b-c.service", &["a-b-c.service", "a-b-.service", "a-.service"]),
            ("x--y.service", &["x--y.service", "x--.service", "x-.service"]),
            ("tr-.service", &["tr-.service"]),
            ("a@.service", &["a@.service"]),
            ("a-b@i.service", &["a-b@i.service", "a-b@.service", "a-.service", "a-@i.service", "a-@.service"]),
        ] {
            assert_eq!(folders(name), expected, "{name}");
        }
    }

    #[test]
    fn a_link_is_an_alias_if_systemd_accepts_it() {
        for (link, target, expected) in [
            ("a.service", "b.service", true),
            ("a@.service", "b@.service", true),
            ("a@x.service", "b@x.service", true),
            ("a@x.service", "b@.service", true),
            ("a.service", "b@x.service", true),
            ("a.service", "a.service", false),
            ("a.service", "b.socket", false),
            ("a.service", "b@.service", false),
            ("a@.service", "b.service", false),
            ("a@.service", "b@x.service", false),
            ("a@x.service", "b@y.service", false),
            ("a.service", "b", false),
        ] {
            assert_eq!(is_alias(link, target), expected, "{link} -> {target}");
        }
    }

    #[test]
    fn dependencies_are_resolved_for_the_unit() {
        for (name, unit, expected) in [
            ("a.service", "u.service", Some("a.service")),
            ("a@.service", "u-v.service", Some("a@u-v.service")),
            ("a@.service", "u-v@i.service", Some("a@i.service")),
            ("a@x.service", "u@i.service", Some("a@x.service")),
            ("a@%i.service", "u@i.service", Some("a@i.service")),
            ("a@%i.service", "u.service", Some("a@u.service")),
            ("%p-%j-%N.socket", "u-v@i.service", Some("u-v-v-u-v@i.socket")),
            ("%n", "u@i.service", Some("u@i.service")),
            ("a%%.service", "u.service", Some("a%.service")),
            ("a-%H.service", "u.service", None),
            ("a%", "u.service", None),
        ] {
            assert_eq!(dependency(name, unit).as_deref(), expected, "{name} in {unit}");
        }
    }
}
