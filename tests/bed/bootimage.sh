#!/bin/bash
# BASE (a tree stage) with OVERLAYS (directories to put on top) → OUT/{vmlinuz,initramfs.img,kargs,commit} and the root:
# sysroot.squashfs, or with MEDIUM=disk an installed system's disk.img, see disk.sh.
# REF is the tree's ref (base12); with SELINUX=1 it is labelled, and so is what is put on top.
# Cheap on purpose: it runs every time the agent changes. Only the new files are hashed.
set -euo pipefail
: "${OUT:?}" "${BASE:?}" "${BED:?}" "${MEDIUM:=live}" "${REF:=base12}"
# The sysroot is put together on a tmpfs: ostree syncs the whole file system after commits and deployments, and on a disk
# that others write to this takes half a minute. A separate mount namespace ends with the script.
[ -n "${IN_NAMESPACE:-}" ] || MEDIUM=$MEDIUM REF=$REF IN_NAMESPACE=1 exec unshare -m --propagation private bash "$0"
umask 022
step() { printf '%(%T)T %s\n' -1 "$*"; }
sysroot=$OUT/sysroot
repo=$sysroot/ostree/repo

mkdir "$sysroot"
mount -t tmpfs -o mode=0755 testbed-sysroot "$sysroot"
ostree admin init-fs --modern "$sysroot"
ostree config --repo="$repo" set sysroot.bootloader none
# On a medium that cannot be written anyway, ostree-prepare-root refuses sysroot.readonly=true (it wants to remount).
readonly=false
[ "$MEDIUM" != disk ] || readonly=true
ostree config --repo="$repo" set sysroot.readonly "$readonly"

step "base"
# A summary would be believed about which branches there are.
ostree pull-local --disable-fsync --repo="$repo" "$BASE/repo" "$REF"
overlay=$sysroot/.overlay
mkdir -p "$overlay/usr"
for dir in ${OVERLAYS:-}; do cp -a "$dir/." "$overlay/"; done
# A deployment's defaults are in /usr/etc.
if [ -d "$overlay/etc" ]; then
    mkdir -p "$overlay/usr/etc"
    cp -a "$overlay/etc/." "$overlay/usr/etc/"
    rm -rf "${overlay:?}/etc"
fi
step "commit"
ostree commit --repo="$repo" --fsync=no --branch=testbed/bootimage --subject="bootimage of the test bed" --bootable \
    --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version=12.base \
    --owner-uid=0 --owner-gid=0 ${SELINUX:+--selinux-policy-from-base} --tree=ref="$REF" --tree=dir="$overlay"
rm -rf "$overlay"
# As on a real bootimage: one ref, one commit.
ostree refs --repo="$repo" --delete "$REF"
ostree prune --repo="$repo" --refs-only

step "deploy"
ostree admin os-init --sysroot="$sysroot" testbed
ostree admin deploy --sysroot="$sysroot" --os=testbed testbed/bootimage
deployment=$(find "$sysroot/ostree/deploy/testbed/deploy" -mindepth 1 -maxdepth 1 -type d -name '*.0')
# An overlay may bring modules of another kernel.
cp "$deployment"/usr/lib/modules/*/{vmlinuz,initramfs.img} "$OUT/"
sed -n 's/^options //p' "$sysroot"/boot/loader/entries/*.conf | grep -o 'ostree=[^ ]*' >"$OUT/kargs"
basename "$deployment" .0 >"$OUT/commit"
if [ "$MEDIUM" = disk ]; then
    step "disk"
    IMAGE=$OUT/disk.img SYSROOT=$sysroot DEPLOYMENT=$deployment bash "$BED/${DISK:-disk.sh}"
else
    # The kernel is started by the emulator: what ostree put into /boot is not needed on the medium.
    rm -rf "$sysroot"/boot/ostree
    if [ -z "${SELINUX:-}" ]; then
        step "composefs"
        # Debian 12's ostree does not make the image. A container can mount its root from it, as a newer ostree does.
        mkdir "$OUT/metadata"
        mount -t tmpfs testbed-metadata "$OUT/metadata"
        # ostree makes the directory of a deployment immutable where the file system can do that.
        chattr -i "$deployment" || true
        python3 "$BED/composefs.py" "$repo" "$(cat "$OUT/commit")" "$deployment/.ostree.cfs" "$OUT/metadata"
        umount "$OUT/metadata"
        rmdir "$OUT/metadata"
    fi
    step "squashfs"
    mksquashfs "$sysroot" "$OUT/sysroot.squashfs" -comp lz4 -noappend -no-progress -quiet
fi
umount "$sysroot"
rmdir "$sysroot"
step "done"
