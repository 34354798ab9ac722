//! Metadata of directories, as dirmeta objects and with their SELinux label. Pure, except that it reads metadata objects.

use ostree::glib::Variant;
use ostree::glib::variant::ToVariant;
use serde::{Deserialize, Serialize};

use crate::import::tree::{Lookup, TreeError, load};
use crate::store::{ObjectId, ObjectType, Xattrs};

/// File type of directories in a mode.
pub(super) const S_IFDIR: u32 = 0o040_000;

/// Extended attributes: names without NUL, and values.
pub(in crate::import) type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Extended attribute that has the label.
pub(super) const SELINUX: &[u8] = b"security.selinux";

/// Metadata of a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(in crate::import) struct DirMeta {
    pub uid: u32,
    pub gid: u32,
    /// Permission bits only (07777).
    pub mode: u32,
    pub xattrs: Pairs,
}

/// Mode and owner of most directories that a program made because an archive has no entry for them.
const MADE: (u32, u32, u32) = (0o755, 0, 0);

impl DirMeta {
    /// Returns the mode and the owner.
    pub fn rights(&self) -> (u32, u32, u32) {
        (self.mode, self.uid, self.gid)
    }

    /// Returns true if the directory may have no entry in an archive.
    pub fn is_made(&self) -> bool {
        self.rights() == MADE
    }
}

/// Reads a dirmeta object.
pub(super) fn read_dirmeta(meta: &ObjectId, lookup: &mut Lookup<'_>) -> Result<DirMeta, TreeError> {
    let bytes = load(meta, ObjectType::DirMeta, lookup)?;
    let bad = || TreeError::Malformed(*meta, "dirmeta", "not a dirmeta in normal form");
    let variant = Variant::from_data::<(u32, u32, u32, Vec<(Vec<u8>, Vec<u8>)>), _>(bytes);
    let fields = variant.is_normal_form().then(|| variant.get::<(u32, u32, u32, Vec<(Vec<u8>, Vec<u8>)>)>()).flatten();
    let (uid, gid, mode, xattrs) = fields.ok_or_else(bad)?;
    let mut pairs = Vec::with_capacity(xattrs.len());
    for (mut name, value) in xattrs {
        name.pop().filter(|nul| *nul == 0).ok_or_else(bad)?;
        pairs.push((name, value));
    }
    Ok(DirMeta { uid: u32::from_be(uid), gid: u32::from_be(gid), mode: u32::from_be(mode) & 0o7777, xattrs: pairs })
}

/// Returns the bytes of the dirmeta object.
pub(in crate::import) fn dirmeta_bytes(meta: &DirMeta) -> Vec<u8> {
    let xattrs = Xattrs::from_pairs(meta.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())));
    let with_nul = |name: &[u8]| name.iter().copied().chain([0]).collect::<Vec<u8>>();
    let pairs: Vec<(Vec<u8>, Vec<u8>)> = xattrs.iter().map(|(name, value)| (with_nul(name), value.to_vec())).collect();
    let mode = S_IFDIR | (meta.mode & 0o7777);
    (meta.uid.to_be(), meta.gid.to_be(), mode.to_be(), pairs).to_variant().data().to_vec()
}

/// Sets the label, and sorts the attributes by name.
pub(super) fn set_label(xattrs: &mut Pairs, label: Vec<u8>) {
    xattrs.retain(|(name, _)| name != SELINUX);
    xattrs.push((SELINUX.to_vec(), label));
    xattrs.sort();
}

/// Returns the label, or `None` if the attributes have none.
pub(super) fn label_of(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<&[u8]> {
    xattrs.iter().find(|(name, _)| name == SELINUX).map(|(_, value)| value.as_slice())
}
