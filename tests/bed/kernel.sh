#!/bin/bash
# The kernel of Debian 11 (5.10), older than that of any system with the agent: OUT/vmlinuz, OUT/tree with the modules that
# the test bed's machines need, and OUT/modules.img, the same for the end of another kernel's initramfs.
# Only extracted, never installed: the host's packages and apt sources stay as they are.
set -euo pipefail
: "${OUT:?}"
umask 022
mmdebstrap --mode=root --variant=extract --include=linux-image-amd64 bullseye "$OUT/root"
version=$(basename "$OUT"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
cp "$OUT/root/boot/vmlinuz-$version" "$OUT/vmlinuz"
all=$OUT/root lib=lib/modules/$version
[ -d "$all/$lib" ] || all=$OUT/root/usr
depmod -b "$all" "$version"
# As in tests/bed/dracut, and the modules that the assertions load. /lib is a link to usr/lib.
kept=$OUT/tree/usr
mkdir -p "$kept/$lib"
for module in virtio_pci virtio_blk virtio_net squashfs erofs overlay ext4 loop dummy vxlan; do
    modprobe --dirname "$all" --set-version "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | sort -u | while read -r file; do
    file=${file#"$all/"}
    mkdir -p "$kept/${file%/*}"
    cp "$all/$file" "$kept/$file"
done
cp "$all/$lib"/modules.{order,builtin,builtin.modinfo} "$kept/$lib/"
depmod -b "$kept" "$version"
(cd "$OUT/tree" && find usr -print0 | LC_ALL=C sort -z | cpio --null --create --format=newc --quiet --reproducible --owner=0:0) >"$OUT/modules.img"
rm -rf "$OUT/root"
ls -l "$OUT"
