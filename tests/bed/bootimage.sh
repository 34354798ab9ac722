#!/bin/bash
# BASE (a tree stage) with OVERLAYS (directories to put on top) → OUT/{vmlinuz,initramfs.img,sysroot.squashfs,kargs}.
# Cheap on purpose: it runs every time the agent changes. Objects are hardlinked, only the new files are hashed.
set -euo pipefail
: "${OUT:?}" "${BASE:?}" "${BED:?}"
repo=$OUT/repo sysroot=$OUT/sysroot
umask 022

cp -al "$BASE/repo" "$repo"
overlays=$OUT/overlay
mkdir -p "$overlays/usr"
for overlay in ${OVERLAYS:-}; do
    cp -a "$overlay/." "$overlays/"
done
# A deployment's defaults are in /usr/etc.
if [ -d "$overlays/etc" ]; then mkdir -p "$overlays/usr/etc" && cp -a "$overlays/etc/." "$overlays/usr/etc/" && rm -rf "$overlays/etc"; fi
# Links that `systemctl enable` would make for the units of the overlay are the installer's business, not ours.
ostree commit --repo="$repo" --branch=testbed/bootimage --subject="bootimage of the test bed" --bootable \
    --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version=12.base \
    --owner-uid=0 --owner-gid=0 --tree=ref=base12 --tree=dir="$overlays"

mkdir -p "$sysroot"
ostree admin init-fs --modern "$sysroot"
ostree config --repo="$sysroot/ostree/repo" set sysroot.bootloader none
ostree config --repo="$sysroot/ostree/repo" set sysroot.readonly true
ostree pull-local --disable-fsync --repo="$sysroot/ostree/repo" "$repo" testbed/bootimage
ostree admin os-init --sysroot="$sysroot" testbed
ostree admin deploy --sysroot="$sysroot" --os=testbed testbed/bootimage
# Real bootimages know their own version by a ref; the deployment keeps one under ostree/.
deployment=$(find "$sysroot/ostree/deploy/testbed/deploy" -mindepth 1 -maxdepth 1 -type d -name '*.0')
modules=$(find "$deployment/usr/lib/modules" -mindepth 1 -maxdepth 1 -type d)
cp "$modules/vmlinuz" "$modules/initramfs.img" "$OUT/"
entry=$(cat "$sysroot"/boot/loader/entries/*.conf)
sed -n 's/^options //p' <<<"$entry" | grep -o 'ostree=[^ ]*' >"$OUT/kargs"
basename "$deployment" .0 >"$OUT/commit"
# The kernel is started by the emulator: what ostree put into /boot is not needed on the medium.
rm -rf "$sysroot"/boot/ostree
mksquashfs "$sysroot" "$OUT/sysroot.squashfs" -comp lz4 -noappend -no-progress -quiet
rm -rf "$sysroot" "$repo" "$overlays"
