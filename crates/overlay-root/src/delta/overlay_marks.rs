//! Marks for overlayfs in the target's files. In the delta, overlayfs would interpret them: an opaque directory would hide
//! unchanged entries, and a metacopy file would be unreadable. They are for other overlays (embedded container storage), so
//! the delta omits them.

use std::path::Path;

use anyhow::{Context, Result};

/// Prefix of overlayfs's attributes.
const ATTRIBUTES: &[u8] = b"trusted.overlay.";
/// Prefix of files that ostree checks out as whiteouts.
const WHITEOUT: &str = ".ostree-wh.";

/// Numbers of the entries that were omitted or changed.
#[derive(Debug, Default)]
pub(super) struct Marks {
    attributes: Count,
    whiteouts: Count,
}

#[derive(Debug, Default)]
struct Count {
    entries: u64,
    example: String,
}

impl Count {
    fn add(&mut self, path: &Path) {
        if self.entries == 0 {
            self.example = path.display().to_string();
        }
        self.entries += 1;
    }
}

/// Returns true if the attribute is one of overlayfs's.
pub(super) fn is_attribute(name: &[u8]) -> bool {
    name.starts_with(ATTRIBUTES)
}

/// Returns true if ostree checks out a file of this name as a whiteout.
pub(super) fn is_whiteout(name: &str) -> bool {
    name.starts_with(WHITEOUT)
}

/// Returns true if the file on disk has attributes of overlayfs.
pub(super) fn has_attribute(path: &Path) -> Result<bool> {
    let mut names = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other.with_context(|| format!("cannot list the attributes of {}", path.display()))?,
    };
    Ok(names[..length].split(|byte| *byte == 0).any(is_attribute))
}

impl Marks {
    pub(super) fn add_attributes(&mut self, path: &Path) {
        self.attributes.add(path);
    }

    pub(super) fn add_whiteout(&mut self, path: &Path) {
        self.whiteouts.add(path);
    }

    /// Returns one line for each kind that was found.
    pub(super) fn warnings(&self) -> Vec<String> {
        let line = |count: &Count, text: &str| {
            let Count { entries, example } = count;
            (*entries > 0).then(|| format!("{entries} {text}, for example /usr/{example}"))
        };
        let attributes = "files and directories lose their attributes for overlayfs (trusted.overlay.*)";
        let whiteouts = "whiteouts for nested overlays (.ostree-wh.*) are omitted";
        [line(&self.attributes, attributes), line(&self.whiteouts, whiteouts)].into_iter().flatten().collect()
    }
}
