//! Where an entry of a plain layer belongs in an ostree tree. Pure.
//!
//! Format source: the OCI image layer specification, and how ostree-ext places plain layers: content
//! belongs below `/usr`, `/etc` becomes `/usr/etc`, directories that are mounted over at run time stay
//! empty, anything else at the top cannot be part of a commit.

/// What to do with things outside `/usr` and `/etc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::import) struct Placement {
    /// `/var` stays where it is, instead of becoming `/usr/share/factory/var`. As ostree-ext does, from
    /// libostree 2024.3 on (which knows what to do with it).
    pub keep_var: bool,
    /// The base has a transient root: any top-level directory may have content.
    pub any_top_level: bool,
}

/// Where a path belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// At this path in the tree; empty for the root itself.
    At(Vec<String>),
    /// In the layer's own part of the repo's object directory: a content object that others link to.
    RepoObject(String),
    /// Nowhere; the text says below what, for the operator.
    Nowhere(String),
}

/// Why a path is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadName {
    /// It leaves the archive's root.
    #[error("escapes the archive's root")]
    Escapes,
    /// A NUL in it, or a component that no file system takes.
    #[error("is no path that a file system can hold")]
    Unusable,
}

/// A name that is not UTF-8 stands in a tree as this and its escaped form. No file name has a slash, so
/// it is taken for no other; and no commit can have it, so it must be gone when all layers are laid.
const FOREIGN: char = '/';

/// A name, as trees of layers have it.
fn name(part: &[u8]) -> String {
    std::str::from_utf8(part).map_or_else(|_| format!("{FOREIGN}{}", part.escape_ascii()), str::to_owned)
}

/// The escaped form of a name that is not UTF-8; `None` for a name that is.
pub(super) fn foreign(name: &str) -> Option<&str> {
    name.strip_prefix(FOREIGN)
}

/// A path as messages show it: relative, with escapes where it is not UTF-8.
pub(super) fn shown(path: &[String]) -> String {
    path.iter().map(|name| foreign(name).unwrap_or(name)).collect::<Vec<_>>().join("/")
}

/// No file system call takes a longer path, and nothing sensible is deeper.
const LONGEST: usize = 4096;
const DEEPEST: usize = 256;

/// The repo in the tree that container tools see.
const REPO: [&str; 3] = ["sysroot", "ostree", "repo"];

impl Placement {
    /// Places a path as it stands in an archive.
    pub(super) fn place(&self, path: &[u8]) -> Result<Place, BadName> {
        if path.len() > LONGEST {
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
        if parts.len() > DEEPEST {
            return Err(BadName::Unusable);
        }
        let below = |prefix: &[&str]| {
            let rest = parts.iter().map(|part| name(part));
            prefix.iter().map(|part| part.to_string()).chain(rest).collect::<Vec<_>>()
        };
        let Some(top) = parts.first().map(|part| name(part)) else { return Ok(Place::At(Vec::new())) };
        Ok(match top.as_str() {
            "usr" => Place::At(below(&[])),
            "etc" => Place::At(below(&["usr"])),
            "var" if self.keep_var => Place::At(below(&[])),
            "var" => Place::At(below(&["usr", "share", "factory"])),
            "run" | "tmp" | "proc" | "sys" | "dev" if parts.len() == 1 => Place::At(below(&[])),
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
    fn places() {
        let plain = Placement::default();
        let object = "sysroot/ostree/repo/objects/ab/cd.file";
        for (path, expected) in [
            (b"/usr/bin/blah".as_slice(), at("usr/bin/blah")),
            (b"./usr///share/.//blah/", at("usr/share/blah")),
            (b"etc/foo", at("usr/etc/foo")),
            (b"etc", at("usr/etc")),
            (b"etcc/foo", nowhere("/etcc")),
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
            (b"opt/puppet", at("opt/puppet")),
            (b"\xff", Ok(Place::At(vec!["/\\xff".into()]))),
            (b"run/x", nowhere("/run")),
            (b"sysroot/x", nowhere("/sysroot")),
        ] {
            assert_eq!(transient.place(path), expected);
        }
    }

    proptest! {
        #[test]
        fn total_and_never_outside(path in prop::collection::vec(any::<u8>(), 0..80), keep_var: bool, any_top_level: bool) {
            if let Ok(Place::At(parts)) = (Placement { keep_var, any_top_level }).place(&path) {
                prop_assert!(parts.iter().all(|part| !part.is_empty() && part != "." && part != ".."));
                prop_assert!(parts.iter().all(|part| !foreign(part).unwrap_or(part).contains('/')));
                prop_assert_eq!(parts.iter().any(|part| foreign(part).is_some()), std::str::from_utf8(&path).is_err());
            }
        }
    }
}
