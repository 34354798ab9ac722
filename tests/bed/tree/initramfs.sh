#!/bin/bash
# Kernel and initramfs to where ostree looks for them: /usr/lib/modules/VERSION/{vmlinuz,initramfs.img}.
set -euo pipefail
root=$1
version=$(basename "$root"/boot/vmlinuz-* | sed 's/^vmlinuz-//')
cp "$root/boot/vmlinuz-$version" "$root/usr/lib/modules/$version/vmlinuz"
cp -r "$BED/dracut/90testbed-live" "$root/usr/lib/dracut/modules.d/90testbed-live"
chmod +x "$root/usr/lib/dracut/modules.d/90testbed-live"/*.sh
chroot "$root" depmod "$version"
# Only what this machine type and an ostree root need: every module left out is boot time under emulation.
chroot "$root" dracut --no-hostonly --no-hostonly-cmdline --kver "$version" --reproducible --compress=cat --force --quiet \
    --modules "systemd systemd-initrd dracut-systemd base fs-lib rootfs-block udev-rules usrmount shutdown ostree testbed-live" \
    "/usr/lib/modules/$version/initramfs.img"
rm -rf "$root/usr/lib/dracut/modules.d/90testbed-live"
ls -l "$root/usr/lib/modules/$version"
