#!/bin/bash
# SYSROOT (with DEPLOYMENT in it) → IMAGE, an installed system's disk (sparse) as CoreOS has it: an ext4 partition for /boot
# and an xfs partition for the root. The starts of the partitions are also in tests/harness/src/disk.rs.
set -euo pipefail
: "${IMAGE:?}" "${SYSROOT:?}" "${DEPLOYMENT:?}"
mib=1048576
# With room for a node image.
truncate -s 3329M "$IMAGE"
printf '%s\n' 'label: dos' 'start=1MiB, size=256MiB' 'start=257MiB' | sfdisk --quiet "$IMAGE"
# Part of the machine's own configuration: an image does not replace it.
echo 'LABEL=boot /boot ext4 ro,nodev,nosuid 0 2' >>"$DEPLOYMENT/etc/fstab"
mkfs.ext4 -q -L boot -E offset=$mib -d "$SYSROOT/boot" "$IMAGE" 256M
find "$SYSROOT/boot" -mindepth 1 -delete
loop=$(losetup --find --show --offset $((257 * mib)) "$IMAGE")
trap '! mountpoint -q "$IMAGE.root" || umount "$IMAGE.root"; losetup --detach "$loop"' EXIT
mkfs.xfs -q -L root "$loop"
mkdir "$IMAGE.root"
mount "$loop" "$IMAGE.root"
cp -a "$SYSROOT/." "$IMAGE.root/"
umount "$IMAGE.root"
rmdir "$IMAGE.root"
