//! Marks for overlayfs in the target's own files. In the delta, overlayfs would obey them: an opaque directory hides
//! its unchanged neighbours, a metacopy file cannot be read. They are meant for other overlays (embedded container
//! storage), so the delta leaves them out.

use std::path::Path;

use anyhow::{Context, Result};

/// The prefix of the attributes that overlayfs keeps its notes in.
const ATTRIBUTES: &[u8] = b"trusted.overlay.";
/// The prefix of files that ostree checks out as whiteouts.
const WHITEOUT: &str = ".ostree-wh.";

/// Counts the entries that were left out or changed.
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
    fn note(&mut self, path: &Path) {
        if self.entries == 0 {
            self.example = path.display().to_string();
        }
        self.entries += 1;
    }
}

/// Returns true if the attribute is a note of overlayfs.
pub(super) fn is_attribute(name: &[u8]) -> bool {
    name.starts_with(ATTRIBUTES)
}

/// Returns true if a file of this name stands for a whiteout.
pub(super) fn is_whiteout(name: &str) -> bool {
    name.starts_with(WHITEOUT)
}

/// Returns true if the file on disk has notes of overlayfs.
pub(super) fn has_attribute(path: &Path) -> Result<bool> {
    let mut names = vec![0; 65_536];
    let length = match rustix::fs::llistxattr(path, names.as_mut_slice()) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        other => other.with_context(|| format!("listing the attributes of {}", path.display()))?,
    };
    Ok(names[..length].split(|byte| *byte == 0).any(is_attribute))
}

impl Marks {
    pub(super) fn note_attributes(&mut self, path: &Path) {
        self.attributes.note(path);
    }

    pub(super) fn note_whiteout(&mut self, path: &Path) {
        self.whiteouts.note(path);
    }

    /// Returns one line for each kind that was found.
    pub(super) fn warnings(&self) -> Vec<String> {
        let line = |count: &Count, what: &str| {
            let Count { entries, example } = count;
            (*entries > 0).then(|| format!("{entries} {what}, /usr/{example} for one"))
        };
        let attributes = "files and directories are shown without their attributes for overlayfs (trusted.overlay.*)";
        let whiteouts = "whiteouts for nested overlays (.ostree-wh.*) are not shown";
        [line(&self.attributes, attributes), line(&self.whiteouts, whiteouts)].into_iter().flatten().collect()
    }
}
