//! The installer's scripts as units of a guest: the steps, in the same order, in place of the agent's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;
use testbed::files::Files;
use testbed::images::project;

/// Kernel arguments: the boot goes to the target of the scripts, and the agent leaves it alone.
pub const KARGS: [&str; 2] = ["node-image-pivot=off", "systemd.unit=incumbent.target"];

/// Unit that starts the pull.
pub const PULL: &str = "incumbent-pull.service";

/// Adds scripts, units and ostree-ext as a program.
pub fn files(files: &Files, image: &str, oracle: &Path) -> Result<()> {
    let script = fs::read_to_string(project().join("tests/bed/incumbent.sh"))?;
    files.put("/var/incumbent/incumbent.sh", 0o755, &script)?;
    let program = files.root().join("var/incumbent/oracle");
    fs::copy(oracle, &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let unit = |name: &str, text: &str| files.put(&format!("/etc/systemd/system/incumbent{name}"), 0o644, text);
    unit(
        ".target",
        "[Unit]\nRequires=basic.target\nWants=ssh.service getty.target systemd-user-sessions.service\n\
         Requires=incumbent-pull.service incumbent-overlay.service incumbent-finish.service\n\
         After=basic.target incumbent-overlay.service\nAllowIsolate=yes\n",
    )?;
    let service = |after: &str, command: &str| {
        format!("[Unit]\n{after}\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={command}\n")
    };
    unit("-pull.service", &service("After=network.target", &format!("/var/incumbent/incumbent.sh pull {image}")))?;
    unit(
        "-overlay.service",
        &service(&format!("Requires={PULL}\nAfter={PULL}"), "/var/incumbent/incumbent.sh overlay"),
    )?;
    let overlay = "incumbent-overlay.service";
    let isolate = "systemctl --no-block isolate multi-user.target";
    unit("-finish.service", &service(&format!("Requires={overlay}\nAfter={overlay}"), isolate))
}
