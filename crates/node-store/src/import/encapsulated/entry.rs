//! What a path in an encapsulated layer stands for. Pure.
//!
//! Format source: ostree-ext's layer layout. Objects are at `sysroot/ostree/repo/objects/AA/REST.…`,
//! in format 0 with `./` in front; everything else shows the tree to container tools and is not read.

use crate::store::{ObjectId, ObjectType};

/// An entry's role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::import) enum Role {
    /// An object of the repo.
    Object(ObjectId, ObjectType),
    /// Extended attributes, named by their own checksum.
    Xattrs(ObjectId),
    /// Names the extended attributes of the content object that follows: a hardlink to them.
    XattrsLink(ObjectId),
    /// A path of the tree, or the repo's own structure.
    Other,
}

/// Why a path is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::import) enum BadPath {
    /// It leaves the archive's root.
    #[error("escapes the archive's root")]
    Escapes,
    /// It is in the repo's object directories but names no object.
    #[error("names no object")]
    NoObject,
}

const OBJECTS: &[u8] = b"sysroot/ostree/repo/objects/";

/// The role of `path`, which must be relative and stay below the archive's root.
pub(in crate::import) fn role(path: &[u8]) -> Result<Role, BadPath> {
    let path = inside(path)?;
    let Some(object) = path.strip_prefix(OBJECTS) else { return Ok(Role::Other) };
    let object = object.strip_suffix(b"/").unwrap_or(object);
    // The directories themselves: `objects/` and `objects/AA`.
    if object.len() <= 2 {
        return Ok(Role::Other);
    }
    let mut parts = object.splitn(2, |byte| *byte == b'/');
    let (prefix, name) = (parts.next().unwrap_or_default(), parts.next().ok_or(BadPath::NoObject)?);
    let dot = name.iter().position(|byte| *byte == b'.').ok_or(BadPath::NoObject)?;
    let id = ObjectId::from_parts(prefix, &name[..dot]).ok_or(BadPath::NoObject)?;
    match &name[dot + 1..] {
        b"file-xattrs" => Ok(Role::Xattrs(id)),
        b"file-xattrs-link" => Ok(Role::XattrsLink(id)),
        extension => ObjectType::from_extension(extension).map(|kind| Role::Object(id, kind)).ok_or(BadPath::NoObject),
    }
}

/// The path without a leading `./`, after checking that it stays inside.
pub(super) fn inside(path: &[u8]) -> Result<&[u8], BadPath> {
    let escapes =
        path.starts_with(b"/") || path.contains(&0) || path.split(|byte| *byte == b'/').any(|part| part == b"..");
    if escapes {
        return Err(BadPath::Escapes);
    }
    Ok(path.strip_prefix(b"./").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn roles() {
        let rest = "cd".repeat(31);
        let id = ObjectId::from_parts(b"ab", rest.as_bytes()).unwrap_or(ObjectId([0; 32]));
        let object = |suffix: &str| format!("sysroot/ostree/repo/objects/ab/{rest}.{suffix}");
        for (path, expected) in [
            (object("commit"), Ok(Role::Object(id, ObjectType::Commit))),
            (object("commitmeta"), Ok(Role::Object(id, ObjectType::CommitMeta))),
            (object("dirtree"), Ok(Role::Object(id, ObjectType::DirTree))),
            (object("dirmeta"), Ok(Role::Object(id, ObjectType::DirMeta))),
            (object("file"), Ok(Role::Object(id, ObjectType::File))),
            (format!("./{}", object("file")), Ok(Role::Object(id, ObjectType::File))),
            (object("file-xattrs"), Ok(Role::Xattrs(id))),
            (object("file-xattrs-link"), Ok(Role::XattrsLink(id))),
            (object("filez"), Err(BadPath::NoObject)),
            (object("file/x"), Err(BadPath::NoObject)),
            ("sysroot/ostree/repo/objects/ab/cd.file".into(), Err(BadPath::NoObject)),
            ("sysroot/ostree/repo/objects/abc".into(), Err(BadPath::NoObject)),
            ("sysroot/ostree/repo/objects/ab/".into(), Ok(Role::Other)),
            ("sysroot/ostree/repo/config".into(), Ok(Role::Other)),
            ("./".into(), Ok(Role::Other)),
            ("usr/bin/..foo".into(), Ok(Role::Other)),
            ("usr/../../etc/passwd".into(), Err(BadPath::Escapes)),
            ("..".into(), Err(BadPath::Escapes)),
            ("/etc/passwd".into(), Err(BadPath::Escapes)),
            ("a\0b".into(), Err(BadPath::Escapes)),
        ] {
            assert_eq!(role(path.as_bytes()), expected, "{path}");
        }
    }

    proptest! {
        #[test]
        fn total(path in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = role(&path);
        }
    }
}
