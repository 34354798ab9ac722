//! The files of an installer that ships its own units: names, orderings and paths as in its releases.

use anyhow::Result;
use testbed::check::{contains, same};
use testbed::files::Files;
use testbed::guest::Guest;

/// A file that exists once one of the installer's scripts has run.
const RAN: &str = "/run/installer-script-ran";

/// Units that installer and agent both have.
const SHARED: [&str; 3] = ["node-image-pull.service", "node-image-overlay.service", "node-image-finish.service"];

const PULL: &str = "[Unit]\nWants=var-ostreecontainer.mount\nRequires=network.target NetworkManager.service\n\
    After=network.target var-ostreecontainer.mount\n[Service]\nType=oneshot\nRemainAfterExit=yes\nMountFlags=slave\n\
    ExecStart=/usr/local/bin/node-image-pull.sh\n";
const OVERLAY: &str = "[Unit]\nRequires=node-image-pull.service\nAfter=node-image-pull.service\n[Service]\nType=oneshot\n\
    RemainAfterExit=yes\nExecStart=/usr/local/bin/node-image-overlay.sh\n";
const FINISH: &str = "[Unit]\nRequires=node-image-overlay.service\nAfter=node-image-overlay.service\n[Service]\n\
    Type=oneshot\nExecStart=/usr/bin/touch /run/installer-script-ran\n\
    ExecStart=/usr/bin/systemctl --no-block isolate multi-user.target\n";
const TARGET: &str = "[Unit]\nRequires=basic.target ssh.service getty.target systemd-user-sessions.service\n\
    Requires=node-image-overlay.service node-image-finish.service\n";
const GENERATOR: &str = "#!/bin/sh\nln -sf /etc/systemd/system/node-image-overlay.target \"$1/default.target\"\n";

/// Puts the installer's files below the directory `below`, which is "" or an absolute path.
pub fn put(files: &Files, below: &str) -> Result<()> {
    let script = |more: &str| format!("#!/bin/bash\n{more}\ntouch {RAN}\nexit 1\n");
    for (path, mode, text) in [
        ("/etc/systemd/system/node-image-pull.service", 0o644, PULL),
        ("/etc/systemd/system/node-image-overlay.service", 0o644, OVERLAY),
        ("/etc/systemd/system/node-image-finish.service", 0o644, FINISH),
        ("/etc/systemd/system/node-image-overlay.target", 0o644, TARGET),
        ("/etc/systemd/system-generators/node-image-overlay-generator", 0o755, GENERATOR),
        ("/var/usrlocal/bin/node-image-pull.sh", 0o755, &script("coreos_img=rhel-coreos")),
        ("/var/usrlocal/bin/node-image-overlay.sh", 0o755, &script("")),
    ] {
        files.put(&format!("{below}{path}"), mode, text)?;
    }
    Ok(())
}

/// Checks that systemd uses the agent's units, and that no script of the installer has run.
pub fn is_taken_over(guest: &dyn Guest) -> Result<()> {
    for unit in SHARED {
        same(guest.unit(unit, "FragmentPath")?, format!("/run/systemd/generator.early/{unit}"))?;
    }
    contains(&guest.ask("journalctl -t node-image-pivot-generator -o cat")?, "taking over units of an installer")?;
    guest.ask(&format!("test ! -e {RAN} && ! findmnt /var/ostreecontainer")).map(drop)
}
