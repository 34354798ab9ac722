//! Mark files below `/run/node-image-pivot`: facts about this boot that a later run of the generator, at a reload of systemd,
//! needs.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::under;

/// Mark that the agent writes at the switch, before it reloads systemd. While it exists, the generator redirects nothing.
pub const PIVOTED: &str = "/run/node-image-pivot/pivoted";

/// Mark that the generator writes when it redirects a boot. The agent removes it when it isolates the original target.
pub const REDIRECTED: &str = "/run/node-image-pivot/redirected";

/// The agent's lock, which exists from its first start in this boot on.
pub const STARTED: &str = "/run/node-image-pivot/daemon.lock";

/// systemd's mark of a service that both redirected and ordinary boots start, and that an initramfs does not start.
const LOGINS_PERMITTED: &str = "/run/systemd/units/invocation:systemd-user-sessions.service";

/// Prefix of the line in [`PIVOTED`] that names the root directory.
const ROOT_KEY: &str = "root=";

/// Returns the content of [`PIVOTED`] for the machine whose root is `root`. It names the root directory by device and
/// inode, because a soft reboot keeps `/run` and may replace the root.
///
/// # Errors
/// Fails if the metadata of `root` cannot be read.
pub fn pivoted_text(root: &Path) -> io::Result<String> {
    let metadata = fs::metadata(root)?;
    Ok(format!("{ROOT_KEY}{}:{}\n", metadata.dev(), metadata.ino()))
}

/// Returns true if the switch was made in this root. A mark without the name of a root, or an unreadable mark, counts for
/// every root.
pub fn is_pivoted(root: &Path) -> bool {
    let text = match fs::read_to_string(under(root, PIVOTED)) {
        Ok(text) => text,
        Err(error) => return error.kind() != ErrorKind::NotFound,
    };
    let here = pivoted_text(root).unwrap_or_default();
    text.lines().find(|line| line.starts_with(ROOT_KEY)).is_none_or(|line| line == here.trim_end())
}

/// Returns true if the boot is over: systemd has started services of the default target, and the boot was not redirected.
/// A redirect would then affect only `systemctl default`.
pub fn has_booted(root: &Path) -> bool {
    let exists = |path: &str| fs::symlink_metadata(under(root, path)).is_ok();
    exists(LOGINS_PERMITTED) && !exists(REDIRECTED)
}

/// Removes the mark of a redirect that an earlier root made before a soft reboot. During the redirected boot the mark is
/// kept, even if a later run leaves the boot unchanged: it is needed again after an undo.
pub fn forget_redirect(root: &Path) {
    if fs::symlink_metadata(under(root, LOGINS_PERMITTED)).is_err() {
        // An error means that the mark does not exist.
        let _ = fs::remove_file(under(root, REDIRECTED));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_pivot_counts_for_the_root_that_it_was_made_in() {
        let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mark = under(root.path(), PIVOTED);
        fs::create_dir_all(mark.parent().unwrap()).unwrap();
        assert!(!is_pivoted(root.path()));
        let of = |root: &Path| pivoted_text(root).unwrap();
        for (text, expected) in [
            (of(root.path()), true),
            (format!("registry.example.com/node@sha256:0\n{}", of(root.path())), true),
            (of(other.path()), false),
            // Marks of older agents.
            (String::new(), true),
            ("registry.example.com/node@sha256:0".to_owned(), true),
        ] {
            fs::write(&mark, &text).unwrap();
            assert_eq!(is_pivoted(root.path()), expected, "{text}");
        }
    }

    #[test]
    fn a_boot_is_over_when_logins_are_permitted_without_a_redirect() {
        for (marks, expected) in [
            (vec![], false),
            (vec![REDIRECTED], false),
            (vec![LOGINS_PERMITTED], true),
            (vec![LOGINS_PERMITTED, REDIRECTED], false),
        ] {
            let root = tempfile::tempdir().unwrap();
            for mark in &marks {
                let mark = under(root.path(), mark);
                fs::create_dir_all(mark.parent().unwrap()).unwrap();
                fs::write(mark, "").unwrap();
            }
            assert_eq!(has_booted(root.path()), expected, "{marks:?}");
        }
    }
}
