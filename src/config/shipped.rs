//! Lists the files that `make install` installs below `/usr`.
//!
//! Stage keeps these files of the booted system in the new `/usr` if the node image does not have them, so that the
//! units' `ExecStart=` and the running daemon's binary stay valid after the switch. `tests/units.rs` compares the list
//! with an installation.

/// Paths relative to `/usr`, sorted. Links are listed like files.
pub const SHIPPED: &[&str] = &[
    "bin/node-image-pivot",
    "lib/dracut/modules.d/98node-image-pivot/carry.sh",
    "lib/dracut/modules.d/98node-image-pivot/module-setup.sh",
    "lib/dracut/modules.d/98node-image-pivot/node-image-pivot-carry.service",
    "lib/systemd/system-generators/node-image-pivot-generator",
    "lib/systemd/system/node-image-finish.service",
    "lib/systemd/system/node-image-overlay.service",
    "lib/systemd/system/node-image-overlay.target",
    "lib/systemd/system/node-image-pivot.target",
    "lib/systemd/system/node-image-pivotd.service",
    "lib/systemd/system/node-image-pull.service",
    "share/bash-completion/completions/node-image-pivot",
    "share/dbus-1/system.d/org.nodeimage.Pivot1.conf",
    "share/fish/vendor_completions.d/node-image-pivot.fish",
    "share/man/man1/node-image-pivot.1",
    "share/selinux/packages/node-image-pivot-domain.cil",
    "share/selinux/packages/node-image-pivot.cil",
    "share/zsh/site-functions/_node-image-pivot",
];
