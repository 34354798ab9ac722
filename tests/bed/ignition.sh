#!/bin/bash
# OUT/usr: Debian's Ignition with its dracut module, for a tree.
# Only extracted, never installed: the host's packages stay as they are.
set -euo pipefail
: "${OUT:?}"
(cd "$OUT" && apt-get download -q ignition && dpkg-deb -x ignition_*.deb . && rm ignition_*.deb)
# The trees lack dracut's network modules. The configuration is in the initramfs, so Ignition needs no network.
sed -i 's/^    echo qemu systemd url-lib network$/    echo systemd/' "$OUT/usr/lib/dracut/modules.d/30ignition/module-setup.sh"
rm -rf "${OUT:?}/usr/share"
