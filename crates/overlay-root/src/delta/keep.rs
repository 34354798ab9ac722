//! Paths of the booted `/usr` that the switch leaves alone.

use std::path::{Component, Path, PathBuf};

use support::pattern;

/// What shows through from the booted `/usr`. All paths are relative to `/usr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// Subtrees that stay the booted ones, whatever the target holds there.
    frozen: Vec<PathBuf>,
    /// Patterns for files and subtrees that are not removed when the target lacks them. `*` stands
    /// for any run of bytes within one path component. Where the target has a version, it wins.
    spared: Vec<PathBuf>,
}

/// What [`Keep`] says about one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// In a subtree that stays the booted one.
    Frozen,
    /// Not removed when the target lacks it, with all below it.
    Spared,
    /// Something below it may be frozen or spared.
    Above,
    /// Not ours to care about.
    Free,
}

impl Default for Keep {
    /// The running kernel's modules, and the files that this project ships.
    fn default() -> Self {
        Self::new(
            ["lib/modules"],
            [
                "bin/node-image-pivot",
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
    /// See the fields: `frozen` are plain paths, `spared` are patterns.
    pub fn new<'a>(frozen: impl IntoIterator<Item = &'a str>, spared: impl IntoIterator<Item = &'a str>) -> Self {
        let paths = |path: &str| PathBuf::from(path.trim_matches('/'));
        Self { frozen: frozen.into_iter().map(paths).collect(), spared: spared.into_iter().map(paths).collect() }
    }

    /// Nothing is kept.
    pub fn nothing() -> Self {
        Self::new([], [])
    }

    /// Whether `path` stays the booted one, whatever the target holds.
    pub fn is_frozen(&self, path: &Path) -> bool {
        self.frozen.iter().any(|frozen| path.starts_with(frozen))
    }

    /// Whether `path` is not removed when the target lacks it.
    pub fn is_spared(&self, path: &Path) -> bool {
        self.is_frozen(path) || self.spared.iter().any(|pattern| matches(pattern, path) == Some(true))
    }

    /// Whether `path` lies strictly above a frozen subtree.
    pub(super) fn above_frozen(&self, path: &Path) -> bool {
        self.frozen.iter().any(|frozen| frozen.starts_with(path) && frozen != path)
    }

    pub(super) fn verdict(&self, path: &Path) -> Verdict {
        if self.is_frozen(path) {
            return Verdict::Frozen;
        }
        let mut above = self.above_frozen(path);
        for pattern in &self.spared {
            match matches(pattern, path) {
                Some(true) => return Verdict::Spared,
                Some(false) => above = true,
                None => {}
            }
        }
        if above { Verdict::Above } else { Verdict::Free }
    }
}

/// `Some(true)`: `path` is, or is below, a match. `Some(false)`: a match may be below it.
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
    fn verdicts() {
        let keep = Keep::default();
        for (path, expected) in [
            ("lib", Verdict::Above),
            ("lib/modules", Verdict::Frozen),
            ("lib/modules/6.1/vmlinuz", Verdict::Frozen),
            ("lib/modules-load.d", Verdict::Free),
            ("bin", Verdict::Above),
            ("bin/node-image-pivot", Verdict::Spared),
            ("bin/node-image-pivotx", Verdict::Free),
            ("lib/systemd/system", Verdict::Above),
            ("lib/systemd/system/node-image-pull.service", Verdict::Spared),
            ("lib/systemd/system/sshd.service", Verdict::Free),
            ("lib/systemd/system/multi-user.target.wants", Verdict::Above),
            ("lib/node-image-pivot.conf.d/10-x.toml", Verdict::Spared),
            ("share/doc", Verdict::Free),
        ] {
            assert_eq!(keep.verdict(Path::new(path)), expected, "{path}");
        }
    }
}
