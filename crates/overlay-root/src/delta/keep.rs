//! Paths of the booted `/usr` that the switch keeps.

use std::path::{Component, Path, PathBuf};

use support::pattern;

/// Paths that stay visible from the booted `/usr`. All paths are relative to `/usr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// Subtrees that stay those of the booted system. The target's content there is ignored.
    frozen: Vec<PathBuf>,
    /// Patterns of files and subtrees that stay if the target lacks them. `*` matches any bytes within one path component.
    spared: Vec<PathBuf>,
}

/// Rule of [`Keep`] for one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The path, with its subtree, is frozen or spared, so it stays if the target lacks it.
    Kept,
    /// A path below it may be frozen or spared.
    Above,
    /// The target decides about the path and its subtree.
    Free,
}

impl Default for Keep {
    /// Keeps the running kernel's modules and the files of this project.
    fn default() -> Self {
        Self::new(
            ["lib/modules"],
            [
                "bin/node-image-pivot",
                "lib/systemd/catalog/node-image-pivot.catalog",
                "lib/systemd/system/node-image-*",
                "lib/systemd/system/*.wants/node-image-*",
                "lib/systemd/system/*.d/*node-image-pivot*",
                "lib/systemd/system-generators/node-image-pivot-generator",
                "lib/systemd/system-preset/*node-image-pivot*",
                "lib/node-image-pivot*",
                "lib/dracut/modules.d/*node-image-pivot",
                "libexec/node-image-pivot*",
                "share/dbus-1/system.d/org.nodeimage.Pivot1*",
                "share/dbus-1/system-services/org.nodeimage.Pivot1*",
                "share/dbus-1/interfaces/org.nodeimage.Pivot1*",
                "share/man/man*/node-image-*",
                "share/bash-completion/completions/node-image-pivot",
                "share/fish/vendor_completions.d/node-image-pivot.fish",
                "share/zsh/*/_node-image-pivot",
                "share/selinux/packages/node-image-pivot*",
            ],
        )
    }
}

impl Keep {
    /// Keeps the subtrees `frozen` as they are in the booted system, and the files and subtrees that match the patterns
    /// `spared` if the target lacks them.
    pub fn new<'a>(frozen: impl IntoIterator<Item = &'a str>, spared: impl IntoIterator<Item = &'a str>) -> Self {
        let paths = |path: &str| PathBuf::from(path.trim_matches('/'));
        Self { frozen: frozen.into_iter().map(paths).collect(), spared: spared.into_iter().map(paths).collect() }
    }

    /// Returns true if `path` is in a frozen subtree.
    pub(super) fn is_frozen(&self, path: &Path) -> bool {
        self.frozen.iter().any(|frozen| path.starts_with(frozen))
    }

    /// Returns true if `path` stays when the target lacks it.
    pub fn is_kept(&self, path: &Path) -> bool {
        self.verdict(path) == Verdict::Kept
    }

    /// Returns true if `path` is a parent of a frozen subtree.
    pub(super) fn above_frozen(&self, path: &Path) -> bool {
        self.frozen.iter().any(|frozen| frozen.starts_with(path) && frozen != path)
    }

    pub(super) fn verdict(&self, path: &Path) -> Verdict {
        if self.is_frozen(path) {
            return Verdict::Kept;
        }
        let mut above = self.above_frozen(path);
        for pattern in &self.spared {
            match matches(pattern, path) {
                Some(true) => return Verdict::Kept,
                Some(false) => above = true,
                None => {}
            }
        }
        if above { Verdict::Above } else { Verdict::Free }
    }
}

/// Returns `Some(true)` if `path` or one of its parents matches, `Some(false)` if a path below it may match, and `None`
/// otherwise.
fn matches(pattern: &Path, path: &Path) -> Option<bool> {
    let mut wanted = pattern.components();
    for component in path.components() {
        match wanted.next() {
            None => return Some(true),
            Some(piece) if pattern::matches(bytes(&piece), bytes(&component)) => {}
            Some(_) => return None,
        }
    }
    Some(wanted.next().is_none())
}

fn bytes<'a>(component: &'a Component<'_>) -> &'a [u8] {
    use std::os::unix::ffi::OsStrExt;
    component.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_keeps_kernel_modules_and_this_projects_files() {
        let keep = Keep::default();
        for (path, expected) in [
            ("lib", Verdict::Above),
            ("lib/modules", Verdict::Kept),
            ("lib/modules/6.1/vmlinuz", Verdict::Kept),
            ("lib/modules-load.d", Verdict::Free),
            ("bin", Verdict::Above),
            ("bin/node-image-pivot", Verdict::Kept),
            ("bin/node-image-pivotx", Verdict::Free),
            ("lib/systemd/system", Verdict::Above),
            ("lib/systemd/system/node-image-pull.service", Verdict::Kept),
            ("lib/systemd/system/sshd.service", Verdict::Free),
            ("lib/systemd/system/multi-user.target.wants", Verdict::Above),
            ("lib/node-image-pivot.conf.d/10-x.toml", Verdict::Kept),
            ("share/doc", Verdict::Free),
        ] {
            assert_eq!(keep.verdict(Path::new(path)), expected, "{path}");
        }
    }
}
