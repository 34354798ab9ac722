//! The files that one boot brings along: what Ignition would write.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::proc::succeed;

/// A folder with `etc/…` and `var/…`, copied over the guest's own before its systemd starts.
pub struct Files {
    root: PathBuf,
}

impl Files {
    /// An empty set under `work`.
    pub fn new(work: &Path) -> Result<Self> {
        let root = work.join("files");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir_all(&root)?;
        Ok(Files { root })
    }

    /// Returns the directory of the files.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Add a file, also in the place of a link; its folders get the usual mode, except a home's: private.
    pub fn put(&self, path: &str, mode: u32, content: &str) -> Result<()> {
        let path = self.root.join(path.trim_start_matches('/'));
        let mut dir = self.root.clone();
        for part in path.strip_prefix(&self.root)?.parent().into_iter().flat_map(Path::components) {
            dir.push(part);
            if !dir.exists() {
                let private = dir.strip_prefix(&self.root)?.starts_with("var/roothome");
                fs::DirBuilder::new().mode(if private { 0o700 } else { 0o755 }).create(&dir)?;
            }
        }
        if path.is_symlink() {
            // Its target may be a file of this machine.
            fs::remove_file(&path)?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    /// Copies the directory `from`, which becomes `path` in the guest.
    pub fn copy(&self, from: &Path, path: &str) -> Result<()> {
        let to = self.root.join(path.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a directory in the root")?)?;
        succeed(Command::new("cp").arg("-a").args([from, &to])).map(drop)
    }

    /// Creates the initramfs `out`: the given one and these files, which testbed-inject.service copies into the root.
    pub fn append_to_initramfs(&self, initramfs: &Path, out: &Path) -> Result<()> {
        self.append(initramfs, "testbed-inject", out)
    }

    /// Creates the initramfs `out`: the given one and these files below the directory `below` of it. It waits longer than 90 s
    /// for the device of the root, because the host may be busy.
    pub fn append(&self, initramfs: &Path, below: &str, out: &Path) -> Result<()> {
        // The kernel unpacks concatenated archives in turn.
        let script = r#"
            set -e
            stage=$(mktemp -d); trap 'rm -rf "$stage"' EXIT
            mkdir -p "$stage/$4"; cp -a "$1/." "$stage/$4/"
            conf=etc/systemd/system.conf.d/testbed.conf
            install -D -m 0644 /dev/stdin "$stage/$conf" <<<$'[Manager]\nDefaultDeviceTimeoutSec=250'
            cat "$2" >"$3"
            cd "$stage"; find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >>"$3"
        "#;
        let mut bash = Command::new("bash");
        succeed(bash.args(["-c", script, "bash"]).arg(&self.root).arg(initramfs).arg(out).arg(below))?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_replaces_a_link_and_leaves_its_target_alone() {
        let work = std::env::temp_dir().join(format!("testbed-files-{}", std::process::id()));
        let files = Files::new(&work).unwrap();
        files.put("/etc/target", 0o666, "of this machine").unwrap();
        let target = files.root().join("etc/target");
        let link = files.root().join("etc/link");
        symlink(&target, &link).unwrap();
        files.put("/etc/link", 0o600, "of the guest").unwrap();
        assert!(!link.is_symlink());
        assert_eq!(fs::read_to_string(&link).unwrap(), "of the guest");
        assert_eq!(fs::read_to_string(&target).unwrap(), "of this machine");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o666);
        fs::remove_dir_all(&work).unwrap();
    }
}
