#!/bin/bash
# SYSROOT (with DEPLOYMENT in it, of a newer ostree) → two media with a composefs root. sysroot.squashfs beside IMAGE: the root
# of a live medium. IMAGE: the disk (sparse) of an installed system, on a file system with fs-verity and with a repo that
# demands it. No object has it yet, because this machine's kernel may lack it.
set -euo pipefail
: "${IMAGE:?}" "${SYSROOT:?}" "${DEPLOYMENT:?}"
# ostree makes the directory of a deployment immutable where the file system can do that.
chattr -i "$DEPLOYMENT" || true
# This machine's ostree may be too old to write the image of the root. The system's own writes to the working directory.
mount --bind "$SYSROOT" "$DEPLOYMENT/sysroot"
mount -t proc proc "$DEPLOYMENT/proc"
chroot "$DEPLOYMENT" sh -c 'cd "/sysroot/$0" && ostree checkout --repo=/sysroot/ostree/repo --composefs-noverity "$1" .ostree.cfs' \
    "${DEPLOYMENT#"$SYSROOT"/}" "$(basename "$DEPLOYMENT" .0)"
umount "$DEPLOYMENT"/{proc,sysroot}
# The kernel of a live medium is started by the emulator.
mksquashfs "$SYSROOT" "$(dirname "$IMAGE")/sysroot.squashfs" -comp lz4 -noappend -no-progress -quiet -e boot/ostree
ostree config --repo="$SYSROOT/ostree/repo" set ex-integrity.fsverity yes
mkfs.ext4 -q -L root -O verity -d "$SYSROOT" "$IMAGE" 3G
