//! The text of the agent at login prompts (issue.d of agetty) and at logins (motd.d of pam_motd).

use std::fs::File;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use selinux_labels::{ATTRIBUTE, FileContexts, Mode};
use support::directory::Directory;

/// Directories and names of the two files, relative to the root. A reboot removes them.
const FILES: [(&str, &str); 2] =
    [("run/issue.d", "80-node-image-pivot.issue"), ("run/motd.d", "80-node-image-pivot.motd")];
/// agetty shows its prompt again, with the issue, when this file changes (`agetty --reload`).
const RELOAD: &str = "run/agetty.reload";

/// Shows `text` on the system below `root`, or nothing.
///
/// # Errors
/// A file cannot be written or removed.
pub fn show_at_logins(root: &Path, text: Option<&str>) -> Result<()> {
    let mut changed = false;
    for (directory, name) in FILES {
        let path = root.join(directory);
        let shown = || format!("cannot write {}", path.join(name).display());
        match text {
            Some(text) => {
                // agetty(8) gives a backslash a meaning.
                let text = text.replace('\\', "/");
                let is_new = !path.exists();
                let dir = Directory::ensure(&path).with_context(shown)?;
                if is_new && selinux_labels::mode() != Mode::Disabled {
                    label(&path).with_context(shown)?;
                }
                dir.write_atomic(name, 0o644, text.as_bytes()).with_context(shown)?;
            }
            None if path.join(name).exists() => Directory::ensure(&path)?.remove_all(name).with_context(shown)?,
            None => continue,
        }
        changed = true;
    }
    if !changed {
        return Ok(());
    }
    // A running agetty has created this file. If it is missing, no prompt is on a screen.
    if let Ok(reload) = File::options().write(true).open(root.join(RELOAD)) {
        reload.set_modified(SystemTime::now()).context("cannot reload the login prompts")?;
    }
    Ok(())
}

/// Gives a new directory the label of the policy in `/etc`. The kernel derives its own from the agent's domain, and
/// programs that show the text may not read that.
fn label(path: &Path) -> Result<()> {
    let contexts = FileContexts::read(&[Path::new("/etc/selinux")])?;
    if let Some(label) = contexts.of_directory(path) {
        support::xattr::set(path, ATTRIBUTE.as_bytes(), label.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_text_appears_at_logins_and_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        show_at_logins(temp.path(), None).unwrap();
        assert!(!temp.path().join("run").exists(), "nothing to remove");
        std::fs::create_dir(temp.path().join("run")).unwrap();
        std::fs::write(temp.path().join(RELOAD), "").unwrap();
        let old = File::options().write(true).open(temp.path().join(RELOAD)).unwrap();
        old.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        show_at_logins(temp.path(), Some("a\\nb\n")).unwrap();
        for (directory, name) in FILES {
            assert_eq!(std::fs::read_to_string(temp.path().join(directory).join(name)).unwrap(), "a/nb\n");
        }
        let reloaded = std::fs::metadata(temp.path().join(RELOAD)).unwrap().modified().unwrap();
        assert!(reloaded > SystemTime::UNIX_EPOCH);
        show_at_logins(temp.path(), None).unwrap();
        assert!(FILES.iter().all(|(directory, name)| !temp.path().join(directory).join(name).exists()));
    }
}
