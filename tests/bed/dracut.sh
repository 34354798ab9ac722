#!/bin/bash
# An initramfs of the tree BASE (ref base12), made by its dracut with one more MODULE, installed in FROM →
# OUT/initramfs.img.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${BASE:?}" "${MODULE:?}" "${FROM:?}"
[ -n "${IN_NAMESPACE:-}" ] || IN_NAMESPACE=1 exec unshare -m --propagation private bash "$0"
umask 022
root=$OUT/root
# Copies: files of the tree are replaced.
ostree checkout --force-copy --repo="$BASE/repo" base12 "$root"
mv "$root/usr/etc" "$root/etc"
# A link of the tree is replaced: its target may be a file of this machine.
cp -a --remove-destination "$FROM/." "$root/"
mkdir -p "$root"/var/{roothome,tmp} "$root/etc/dracut.conf.d"
mount -t tmpfs testbed-dracut "$root/var/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
# As the builder of an image adds a module.
echo "add_dracutmodules+=\" $MODULE \"" >"$root/etc/dracut.conf.d/testbed.conf"
for kernel in "$root"/usr/lib/modules/*/vmlinuz; do
    version=$(basename "$(dirname "$kernel")")
    mv "$kernel" "$root/boot/vmlinuz-$version"
    rm "$root/usr/lib/modules/$version/initramfs.img"
done
bash "$BED/tree/initramfs.sh" "$root"
mv "$root/usr/lib/modules/$version/initramfs.img" "$OUT/"
umount -l "$root"/{dev,proc,var/tmp}
rm -rf --one-file-system "$root"
