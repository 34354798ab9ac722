#!/bin/bash
# OUT/usr: Debian's Ignition with its dracut module, for a tree.
# Only extracted, never installed: the host's packages stay as they are.
set -euo pipefail
: "${OUT:?}"
(cd "$OUT" && apt-get download -q ignition && dpkg-deb -x ignition_*.deb . && rm ignition_*.deb)
# The trees lack dracut's network modules. The configuration is in the initramfs, so Ignition needs no network.
setup=$OUT/usr/lib/dracut/modules.d/30ignition/module-setup.sh
sed -i 's/^    echo qemu systemd url-lib network$/    echo systemd/' "$setup"
# Another release of Ignition may have another list: dracut would leave the module out, and only a machine would show it.
grep -q '^    echo systemd$' "$setup" || { echo "cannot remove the network modules from $setup: its list has changed" >&2; exit 1; }
rm -rf "${OUT:?}/usr/share"
