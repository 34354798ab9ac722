#!/bin/bash
# FROM (Debian's Ignition with its dracut module, unpacked), for the trees → OUT.
set -euo pipefail
: "${OUT:?}" "${FROM:?}"
cp -a "$FROM/." "$OUT/"
# The trees lack dracut's network modules. The configuration is in the initramfs, so Ignition needs no network.
setup=$OUT/usr/lib/dracut/modules.d/30ignition/module-setup.sh
sed -i 's/^    echo qemu systemd url-lib network$/    echo systemd/' "$setup"
# Another release of Ignition may have another list: dracut would leave the module out, and only a machine would show it.
grep -q '^    echo systemd$' "$setup" || { echo "cannot remove the network modules from $setup: its list has changed" >&2; exit 1; }
