//! Parses the paths of an encapsulated layer. Pure.
//!
//! Format source: ostree-ext's layer layout. Objects are at `sysroot/ostree/repo/objects/AA/REST.…`, in format 0 with
//! the prefix `./`. All other entries show the tree to container tools and are not read.

use crate::store::{ObjectId, ObjectType};

/// Meaning of an entry, derived from its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::import) enum Role {
    /// An object of the repo.
    Object(ObjectId, ObjectType),
    /// Set of extended attributes, named by its own checksum.
    Xattrs(ObjectId),
    /// Hardlink to the extended attributes of the content object that follows.
    XattrsLink(ObjectId),
    /// Path of the tree, or a directory or configuration of the repo.
    Other,
}

/// Reasons for refusing a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::import) enum BadPath {
    /// The path is absolute or has a `..` or a NUL.
    #[error("escapes the archive's root")]
    Escapes,
    /// The path is in the repo's object directories but is not the name of an object.
    #[error("does not name an object")]
    NotAnObject,
}

const OBJECTS: &[u8] = b"sysroot/ostree/repo/objects/";

/// Returns the role of `path`.
///
/// # Errors
/// If the path leaves the archive's root, or is in the repo's object directories without naming an object.
pub(in crate::import) fn role(path: &[u8]) -> Result<Role, BadPath> {
    let path = inside(path)?;
    let Some(object) = path.strip_prefix(OBJECTS) else { return Ok(Role::Other) };
    let object = object.strip_suffix(b"/").unwrap_or(object);
    // The directories `objects/` and `objects/AA`.
    if object.len() <= 2 {
        return Ok(Role::Other);
    }
    let mut parts = object.splitn(2, |byte| *byte == b'/');
    let (prefix, name) = (parts.next().unwrap_or_default(), parts.next().ok_or(BadPath::NotAnObject)?);
    let dot = name.iter().position(|byte| *byte == b'.').ok_or(BadPath::NotAnObject)?;
    let id = ObjectId::from_parts(prefix, &name[..dot]).ok_or(BadPath::NotAnObject)?;
    match &name[dot + 1..] {
        b"file-xattrs" => Ok(Role::Xattrs(id)),
        b"file-xattrs-link" => Ok(Role::XattrsLink(id)),
        extension => {
            ObjectType::from_extension(extension).map(|kind| Role::Object(id, kind)).ok_or(BadPath::NotAnObject)
        }
    }
}

/// Checks that the path stays below the archive's root, and returns it without a leading `./`.
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
    fn paths_have_roles() {
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
            (object("filez"), Err(BadPath::NotAnObject)),
            (object("file/x"), Err(BadPath::NotAnObject)),
            ("sysroot/ostree/repo/objects/ab/cd.file".into(), Err(BadPath::NotAnObject)),
            ("sysroot/ostree/repo/objects/abc".into(), Err(BadPath::NotAnObject)),
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
        fn any_path_has_a_role_or_is_refused(path in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = role(&path);
        }
    }
}
