//! Maps the path of an entry of a plain layer to its place in an ostree tree. Pure.
//!
//! Format source: the OCI image layer specification, and ostree-ext's rules for plain layers. Content belongs below
//! `/usr`, and `/etc` becomes `/usr/etc`. Directories that are mount points at run time stay empty. Other top-level
//! paths cannot be part of a commit.

/// Rules for paths outside `/usr` and `/etc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::import) struct Placement {
    /// Keep `/var`, instead of moving it to `/usr/share/factory/var`. ostree-ext does so from libostree 2024.3 on, which
    /// populates `/var` itself.
    pub keep_var: bool,
    /// Accept content in any top-level directory: the base has a transient root, or the layers are the whole system.
    pub any_top_level: bool,
}

/// A top-level directory that has another place in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    /// Path in the archive.
    pub archive: &'static str,
    /// Path in the tree.
    pub place: &'static str,
}

/// The directories that ostree keeps elsewhere. `/var` is moved only by an older libostree.
pub(super) const MOVED: [Moved; 2] =
    [Moved { archive: "etc", place: "usr/etc" }, Moved { archive: "var", place: "usr/share/factory/var" }];

/// Place of a path in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// Path in the tree; empty for the root.
    At(Vec<String>),
    /// Path of a content object in the repo's object directory, to which hardlinks may lead.
    RepoObject(String),
    /// Not part of the tree. The text names the directory, for messages.
    Nowhere(String),
}

/// Reasons for refusing a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadName {
    /// The path has a `..`.
    #[error("escapes the archive's root")]
    Escapes,
    /// The path has a NUL, or is too long or too deep.
    #[error("is not a valid path: it has a NUL, or is too long or too deep")]
    Unusable,
}

/// Prefix of the escaped form of a name that is not UTF-8. File names cannot have a slash, so that the escaped form is
/// unambiguous. A commit cannot have such a name, so a later layer must remove it.
const FOREIGN: char = '/';

/// Returns a name in the form that trees of layers use.
fn name(part: &[u8]) -> String {
    std::str::from_utf8(part).map_or_else(|_| format!("{FOREIGN}{}", part.escape_ascii()), str::to_owned)
}

/// Returns the escaped form of a name that is not UTF-8, or `None` for a UTF-8 name.
pub(super) fn foreign(name: &str) -> Option<&str> {
    name.strip_prefix(FOREIGN)
}

/// Returns a path in the form that messages use: relative, with escapes for bytes that are not UTF-8.
pub(super) fn shown(path: &[String]) -> String {
    path.iter().map(|name| foreign(name).unwrap_or(name)).collect::<Vec<_>>().join("/")
}

/// Maximum length of a path in bytes (`PATH_MAX`).
const MAX_LENGTH: usize = 4096;
/// Maximum number of components of a path.
const MAX_DEPTH: usize = 256;

/// Path of the repo in an encapsulated image.
const REPO: [&str; 3] = ["sysroot", "ostree", "repo"];

impl Placement {
    /// Returns the place of a path of an archive.
    ///
    /// # Errors
    /// If the path leaves the archive's root, or if a file system cannot represent it.
    pub(super) fn place(&self, path: &[u8]) -> Result<Place, BadName> {
        if path.len() > MAX_LENGTH {
            return Err(BadName::Unusable);
        }
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(BadName::Escapes),
                part if part.contains(&0) || part.len() > 255 => return Err(BadName::Unusable),
                part => parts.push(part),
            }
        }
        if parts.len() > MAX_DEPTH {
            return Err(BadName::Unusable);
        }
        let below = |prefix: &[&str]| {
            let rest = parts.iter().map(|part| name(part));
            prefix.iter().map(|part| part.to_string()).chain(rest).collect::<Vec<_>>()
        };
        let Some(top) = parts.first().map(|part| name(part)) else { return Ok(Place::At(Vec::new())) };
        Ok(match top.as_str() {
            "usr" => Place::At(below(&[])),
            "etc" | ".wh.etc" => Place::At(below(&["usr"])),
            "var" | ".wh.var" if self.keep_var => Place::At(below(&[])),
            "var" | ".wh.var" => Place::At(below(&["usr", "share", "factory"])),
            "run" | "tmp" | "proc" | "sys" | "dev" if parts.len() == 1 => Place::At(below(&[])),
            "sysroot" if parts.len() == 1 && self.any_top_level => Place::At(below(&[])),
            "sysroot" if parts.len() > 3 && parts[..3].iter().zip(REPO).all(|(a, b)| *a == b.as_bytes()) => {
                Place::RepoObject(below(&[]).join("/"))
            }
            "run" | "tmp" | "proc" | "sys" | "dev" | "sysroot" => Place::Nowhere(format!("/{top}")),
            _ if self.any_top_level => Place::At(below(&[])),
            top => Place::Nowhere(format!("/{}", foreign(top).unwrap_or(top))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(path: &str) -> Result<Place, BadName> {
        Ok(Place::At(path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()))
    }

    fn nowhere(path: &str) -> Result<Place, BadName> {
        Ok(Place::Nowhere(path.to_owned()))
    }

    #[test]
    fn paths_have_places() {
        let plain = Placement::default();
        let object = "sysroot/ostree/repo/objects/ab/cd.file";
        for (path, expected) in [
            (b"/usr/bin/blah".as_slice(), at("usr/bin/blah")),
            (b"./usr///share/.//blah/", at("usr/share/blah")),
            (b"etc/foo", at("usr/etc/foo")),
            (b"etc", at("usr/etc")),
            (b"etcc/foo", nowhere("/etcc")),
            (b".wh.etc", at("usr/.wh.etc")),
            (b"./.wh.var", at("usr/share/factory/.wh.var")),
            (b"./", at("")),
            (b"var/lib/x", at("usr/share/factory/var/lib/x")),
            (b"run/", at("run")),
            (b"run/x/y", nowhere("/run")),
            (b"opt/puppet", nowhere("/opt")),
            (b".wh.opt", nowhere("/.wh.opt")),
            (b"opt/\xff", nowhere("/opt")),
            (b"\xff/x", nowhere("/\\xff")),
            (b"tmp/\xff", nowhere("/tmp")),
            (b"usr/\xff/\\xff", Ok(Place::At(vec!["usr".into(), "/\\xff".into(), "\\xff".into()]))),
            (b"usr/../../etc", Err(BadName::Escapes)),
            (b"opt/../x", Err(BadName::Escapes)),
            (b"usr/a\0b", Err(BadName::Unusable)),
            (b"sysroot", nowhere("/sysroot")),
            (b"sysroot/ostree/deploy/x", nowhere("/sysroot")),
            (object.as_bytes(), Ok(Place::RepoObject(object.to_owned()))),
        ] {
            assert_eq!(plain.place(path), expected, "{}", path.escape_ascii());
        }
        let transient = Placement { keep_var: true, any_top_level: true };
        for (path, expected) in [
            (b"var/lib/x".as_slice(), at("var/lib/x")),
            (b".wh.var", at(".wh.var")),
            (b"opt/puppet", at("opt/puppet")),
            (b"\xff", Ok(Place::At(vec!["/\\xff".into()]))),
            (b"run/x", nowhere("/run")),
            (b"sysroot", at("sysroot")),
            (b"sysroot/x", nowhere("/sysroot")),
        ] {
            assert_eq!(transient.place(path), expected);
        }
    }

    proptest! {
        #[test]
        fn places_are_always_below_the_root(path in prop::collection::vec(any::<u8>(), 0..80), keep_var: bool, any_top_level: bool) {
            if let Ok(Place::At(parts)) = (Placement { keep_var, any_top_level }).place(&path) {
                prop_assert!(parts.iter().all(|part| !part.is_empty() && part != "." && part != ".."));
                prop_assert!(parts.iter().all(|part| !foreign(part).unwrap_or(part).contains('/')));
                prop_assert_eq!(parts.iter().any(|part| foreign(part).is_some()), std::str::from_utf8(&path).is_err());
            }
        }
    }
}
