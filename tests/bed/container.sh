#!/bin/bash
# Boots the deployment inside BOOT/sysroot.squashfs with systemd-nspawn, or that of the installed system on the image DISK,
# if it is set. The caller runs this script in a separate mount namespace, so its mounts end with it. WORK: folder for mount
# points; FILES: etc/… and var/… of this boot; NETNS: network namespace file; CMDLINE: the content of /proc/cmdline;
# ROOT: plain for the deployment's directory, composefs for a mount of its composefs image, stacked for two stacked
# overlays, on which the kernel accepts no other.
set -euo pipefail
: "${BOOT:?}" "${WORK:?}" "${FILES:?}" "${NETNS:?}" "${DISK:=}" "${CMDLINE:=}" "${ROOT:=plain}"
umask 022

# systemd wants a pure cgroup v2; this machine may mount something else. The namespace is ours, so is this choice.
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup
cgroup=/sys/fs/cgroup/testbed-$$
# The kernel reuses process numbers: a killed test may have left an empty group of this name.
[ ! -d "$cgroup" ] || find "$cgroup" -depth -type d -exec rmdir {} +
mkdir "$cgroup"
echo $$ >"$cgroup/cgroup.procs"

mkdir -p "$WORK"/{sysroot,root,state}
if [ -n "$DISK" ]; then
    # The partitions that disk.sh makes.
    mib=1048576
    mount -t xfs -o loop,offset=$((257 * mib)) "$DISK" "$WORK/sysroot"
    mount -o loop,offset=$mib,sizelimit=$((256 * mib)),ro "$DISK" "$WORK/sysroot/boot"
else
    mount -o loop,ro "$BOOT/sysroot.squashfs" "$WORK/sysroot"
fi
deployment=$WORK/sysroot/ostree/deploy/testbed/deploy/$(cat "$BOOT/commit").0
mount -t tmpfs -o mode=0755 testbed-state "$WORK/state"
mkdir "$WORK"/state/{etc,etc.work}

if [ "$ROOT" = composefs ]; then
    # /usr is not a mount point then, and the image has no path.
    mkdir "$WORK/image"
    mount -t erofs -o ro,loop "$deployment/.ostree.cfs" "$WORK/image"
    objects=$WORK/sysroot/ostree/repo/objects
    mount -t overlay -o "ro,redirect_dir=on,metacopy=on,lowerdir=$WORK/image::$objects" composefs "$WORK/root"
    umount -l "$WORK/image"
elif [ "$ROOT" = stacked ]; then
    mkdir "$WORK"/{none,lower}
    mount -t overlay -o "ro,lowerdir=$WORK/none:$deployment" live-lower "$WORK/lower"
    mount -t overlay -o "ro,lowerdir=$WORK/none:$WORK/lower" live "$WORK/root"
else
    # The root is the deployment's own directory: libostree knows it by device and inode.
    mount --bind "$deployment" "$WORK/root"
    mount --bind "$deployment/usr" "$WORK/root/usr"
fi
mount --bind "$WORK/sysroot" "$WORK/root/sysroot"
if [ -n "$DISK" ]; then
    mount --bind "$deployment/etc" "$WORK/root/etc"
    mount --bind "$WORK/sysroot/ostree/deploy/testbed/var" "$WORK/root/var"
    mount -o remount,bind,ro "$WORK/root/sysroot"
else
    mount -t overlay -o "lowerdir=$deployment/etc,upperdir=$WORK/state/etc,workdir=$WORK/state/etc.work" overlay "$WORK/root/etc"
    mount -t tmpfs -o mode=0755,size=50% tmpfs "$WORK/root/var"
fi
mount --bind "$WORK/sysroot/boot" "$WORK/root/boot"
# A link in the place of a file is replaced: its target may be a file of this machine.
for dir in "$FILES"/*; do cp -a --remove-destination "$dir/." "$WORK/root/${dir##*/}/"; done

: >"$WORK/marker"
: >"$WORK/booted"
# A newer ostree records there from which deployment it mounted the root: a variant a{sv}.
[ "$ROOT" = plain ] || python3 - "$deployment" >"$WORK/booted" <<'EOF'
import os, struct, sys
root = os.stat(sys.argv[1])
key = b"backing-root-device-inode\0"
entry = key.ljust(32, b"\0") + struct.pack("=QQ", root.st_dev, root.st_ino) + b"\0(tt)" + bytes([len(key)])
sys.stdout.buffer.write(entry + bytes([len(entry)]))
EOF
# nspawn makes mounts below /proc when it is inside already: their sources have to be in there, too.
mkdir -p "$WORK/root/var/.testbed"
printf '%s\n' "console=ttyS0 ro ostree=$(cut -d= -f2- "$BOOT/kargs")${CMDLINE:+ $CMDLINE}" >"$WORK/root/var/.testbed/cmdline"
options=(
    --directory="$WORK/root" --boot --register=no --keep-unit --machine="testbed-$$" --network-namespace-path="$NETNS"
    --capability=all --resolv-conf=off --timezone=off --link-journal=no --console=read-only
    --bind-ro=/var/.testbed/cmdline:/proc/cmdline --bind-ro="$WORK/booted:/run/ostree-booted"
)
[ -n "$DISK" ] || options+=(--bind-ro="$WORK/marker:/run/ostree-live")
# The pivot mounts overlays; nspawn's filter of system calls is older than some of what that takes.
export SYSTEMD_SECCOMP=0 SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_USE_CGNS=1
# shellcheck disable=SC2086 # words
exec systemd-nspawn "${options[@]}" -- $CMDLINE
