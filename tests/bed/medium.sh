#!/bin/bash
# BOOT (a live bootimage) as media of CoreOS have it. FORM=pxe: appends its root to the initramfs OUT. FORM=iso: makes the
# ISO file system OUT, labelled LABEL, with the same archive of the root.
set -euo pipefail
: "${BOOT:?}" "${FORM:?}" "${OUT:?}" "${LABEL:=}"
work=$(mktemp -d "$OUT.XXXXXX")
trap 'rm -rf "$work"' EXIT
ln -s "$BOOT/sysroot.squashfs" "$work/root.squashfs"
archive() { (cd "$work" && echo root.squashfs | cpio --quiet --create --format=newc --dereference --owner=0:0); }
case $FORM in
    pxe) archive >>"$OUT" ;;
    iso)
        archive >"$work/rootfs.img"
        pxeboot=images/pxeboot
        xorriso -as mkisofs -quiet -R -V "$LABEL" -o "$OUT" -graft-points "$pxeboot/rootfs.img=$work/rootfs.img" \
            "$pxeboot/vmlinuz=$BOOT/vmlinuz" "$pxeboot/initrd.img=$BOOT/initramfs.img" ;;
esac
