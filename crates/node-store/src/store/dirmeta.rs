//! Metadata of directories, as dirmeta objects and with their SELinux label.

use ostree::glib::Variant;
use ostree::glib::variant::ToVariant;
use serde::{Deserialize, Serialize};

use super::Xattrs;

/// File type of directories in a mode.
pub(crate) const S_IFDIR: u32 = 0o040_000;

/// Extended attributes: names without NUL, and values.
pub(crate) type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Extended attribute that has the label.
pub(crate) const SELINUX: &[u8] = b"security.selinux";

/// Metadata of a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DirMeta {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits only (07777).
    pub mode: u32,
    /// Extended attributes: names without NUL, and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Mode and owner of most directories that a program made because an archive has no entry for them.
const MADE: (u32, u32, u32) = (0o755, 0, 0);

impl DirMeta {
    /// Parses a dirmeta object.
    ///
    /// # Errors
    /// The bytes are not in normal form.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, &'static str> {
        let bad = "not a dirmeta in normal form";
        let variant = Variant::from_data::<(u32, u32, u32, Pairs), _>(bytes);
        let fields = variant.is_normal_form().then(|| variant.get::<(u32, u32, u32, Pairs)>()).flatten();
        let (uid, gid, mode, mut xattrs) = fields.ok_or(bad)?;
        for (name, _) in &mut xattrs {
            name.pop().filter(|nul| *nul == 0).ok_or(bad)?;
        }
        Ok(Self { uid: u32::from_be(uid), gid: u32::from_be(gid), mode: u32::from_be(mode) & 0o7777, xattrs })
    }

    /// Returns the bytes of the dirmeta object.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let xattrs = Xattrs::from_pairs(self.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())));
        let with_nul = |name: &[u8]| name.iter().copied().chain([0]).collect::<Vec<u8>>();
        let pairs: Pairs = xattrs.iter().map(|(name, value)| (with_nul(name), value.to_vec())).collect();
        let mode = S_IFDIR | (self.mode & 0o7777);
        (self.uid.to_be(), self.gid.to_be(), mode.to_be(), pairs).to_variant().data().to_vec()
    }

    /// Returns the mode and the owner.
    pub(crate) fn rights(&self) -> (u32, u32, u32) {
        (self.mode, self.uid, self.gid)
    }

    /// Returns true if the directory may have no entry in an archive.
    pub(crate) fn is_made(&self) -> bool {
        self.rights() == MADE
    }
}

/// Sets the label, and sorts the attributes by name.
pub(crate) fn set_label(xattrs: &mut Pairs, label: Vec<u8>) {
    xattrs.retain(|(name, _)| name != SELINUX);
    xattrs.push((SELINUX.to_vec(), label));
    xattrs.sort();
}

/// Returns the label, or `None` if the attributes have none.
pub(crate) fn label_of(xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<&[u8]> {
    xattrs.iter().find(|(name, _)| name == SELINUX).map(|(_, value)| value.as_slice())
}
