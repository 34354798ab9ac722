#!/bin/sh
# The root of a live medium as /dev/loop0: the squashfs in the initramfs (PXE), or the one in the archive on the ISO file
# system that coreos.liveiso= names.
set -e
if [ -e /root.squashfs ]; then
    exec losetup --read-only /dev/loop0 /root.squashfs
fi
for word in $(cat /proc/cmdline); do
    case $word in coreos.liveiso=*) label=${word#*=} ;; esac
done
udevadm wait --timeout=120 "/dev/disk/by-label/$label"
mkdir -p /run/media/iso
mount -t iso9660 -o ro "/dev/disk/by-label/$label" /run/media/iso
# Behind the header of the archive's first member.
exec losetup --read-only --offset 124 /dev/loop0 /run/media/iso/images/pxeboot/rootfs.img
