//! Commit objects: a GVariant with the metadata, and the checksums of the root's dirtree and dirmeta.
//!
//! Format source: libostree's `OSTREE_COMMIT_GVARIANT_FORMAT`.

use ostree::glib::{Variant, VariantDict, VariantTy};

use super::ObjectId;

fn parse(bytes: Vec<u8>) -> Option<Variant> {
    Some(Variant::from_data_with_type(bytes, VariantTy::new("(a{sv}aya(say)sstayay)").ok()?))
}

/// Returns the metadata in the bytes of a commit object.
pub fn commit_metadata(bytes: Vec<u8>) -> Option<VariantDict> {
    Some(VariantDict::new(Some(&parse(bytes)?.child_value(0))))
}

/// Returns the dirtree and the dirmeta of the root in the bytes of a commit object.
///
/// # Errors
/// The bytes are not in normal form, or a checksum has the wrong length.
pub fn commit_root(bytes: Vec<u8>) -> Result<(ObjectId, ObjectId), &'static str> {
    let commit = parse(bytes).filter(Variant::is_normal_form).ok_or("not a commit in normal form")?;
    let checksum = |index| {
        let bytes = commit.child_value(index).get::<Vec<u8>>().unwrap_or_default();
        ObjectId::from_bytes(&bytes).ok_or("a checksum does not have 32 bytes")
    };
    Ok((checksum(6)?, checksum(7)?))
}
