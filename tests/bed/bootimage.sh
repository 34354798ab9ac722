#!/bin/bash
# BASE (a tree stage) with OVERLAYS (directories to put on top) → OUT/{vmlinuz,initramfs.img,sysroot.squashfs,kargs}.
# Cheap on purpose: it runs every time the agent changes. Objects are hardlinked, only the new files are hashed.
set -euo pipefail
: "${OUT:?}" "${BASE:?}" "${BED:?}"
repo=$OUT/repo sysroot=$OUT/sysroot
umask 022
step() { printf "%(%T)T %s\n" -1 "$*"; }

cp -al "$BASE/repo" "$repo"
# A summary that lacks our commit would be believed by pull-local.
rm -f "$repo"/summary*
ostree config --repo="$repo" set core.fsync false
overlays=$OUT/overlay
mkdir -p "$overlays/usr"
for overlay in ${OVERLAYS:-}; do
    cp -a "$overlay/." "$overlays/"
done
# A deployment's defaults are in /usr/etc.
if [ -d "$overlays/etc" ]; then mkdir -p "$overlays/usr/etc" && cp -a "$overlays/etc/." "$overlays/usr/etc/" && rm -rf "$overlays/etc"; fi
# Links that `systemctl enable` would make for the units of the overlay are the installer's business, not ours.
step commit
ostree commit --repo="$repo" --branch=testbed/bootimage --subject="bootimage of the test bed" --bootable \
    --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version=12.base \
    --owner-uid=0 --owner-gid=0 --tree=ref=base12 --tree=dir="$overlays"

mkdir -p "$sysroot"
ostree admin init-fs --modern "$sysroot"
ostree config --repo="$sysroot/ostree/repo" set sysroot.bootloader none
# On a medium that cannot be written anyway, ostree-prepare-root refuses sysroot.readonly=true (it wants to remount).
ostree config --repo="$sysroot/ostree/repo" set sysroot.readonly false
# A cache that is renamed into place when complete needs no fsync.
ostree config --repo="$sysroot/ostree/repo" set core.fsync false
ostree pull-local --disable-fsync --repo="$sysroot/ostree/repo" "$repo" testbed/bootimage
step deploy
ostree admin os-init --sysroot="$sysroot" testbed
ostree admin deploy --sysroot="$sysroot" --os=testbed testbed/bootimage
deployment=$(find "$sysroot/ostree/deploy/testbed/deploy" -mindepth 1 -maxdepth 1 -type d -name '*.0')
# ostree makes it immutable; on the medium it is read-only anyway, and we want to delete it.
chattr -i "$deployment"
modules=$(find "$deployment/usr/lib/modules" -mindepth 1 -maxdepth 1 -type d)
cp "$modules/vmlinuz" "$modules/initramfs.img" "$OUT/"
entry=$(cat "$sysroot"/boot/loader/entries/*.conf)
sed -n 's/^options //p' <<<"$entry" | grep -o 'ostree=[^ ]*' >"$OUT/kargs"
basename "$deployment" .0 >"$OUT/commit"
# The kernel is started by the emulator: what ostree put into /boot is not needed on the medium.
rm -rf "$sysroot"/boot/ostree
step squashfs
mksquashfs "$sysroot" "$OUT/sysroot.squashfs" -comp lz4 -noappend -no-progress -quiet
step done
rm -rf "$sysroot" "$repo" "$overlays"
