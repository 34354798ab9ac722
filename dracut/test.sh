#!/bin/sh
# Builds an initramfs with the module, unpacks it, and runs carry.sh in it, with this machine as the real root.
# The argument is a directory with the built programs. Needs root (for a private view of /usr), dracut and make. Removes
# all files that it creates.
set -eu

if [ "${1-}" != inside ]; then
    project=$(dirname "$(dirname "$(readlink -f "$0")")")
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    make -s -C "$project" install DESTDIR="$work/installed" BUILD="${1:-$project/target/release}"
    # A private mount namespace shows the installation in this machine's /usr to dracut only.
    unshare --mount --propagation private sh "$0" inside "$work"
    echo "dracut: the module carries a working set"
    exit
fi

work=$2
mkdir "$work/plain-usr"
mount --bind /usr "$work/plain-usr"
mount -t overlay -o "lowerdir=$work/installed/usr:/usr" overlay /usr
# ostree's own module, which a package of this machine may add, needs libostree.
dracut --quiet --force --no-hostonly --no-kernel --kver 0-none --no-compress --no-early-microcode --nofscks \
    --modules "base systemd systemd-initrd node-image-pivot" --omit ostree "$work/initramfs.img" 2> "$work/log" ||
    { cat "$work/log" >&2; exit 1; }
root=$work/root
mkdir "$root"
(cd "$root" && cpio --quiet -idm < "$work/initramfs.img")
test -L "$root/etc/systemd/system/initrd.target.wants/node-image-pivot-carry.service"
libraries=$(find "$root" -name 'libostree*')
test -z "$libraries" || { echo "the initramfs has libraries of the agent: $libraries" >&2; exit 1; }

# The real root: this machine's libraries, and no agent.
sysroot=$root/sysroot
mkdir -p "$sysroot/usr" "$sysroot/run" "$sysroot/dev"
for link in bin sbin lib lib64; do [ ! -L "/$link" ] || cp -P "/$link" "$sysroot/$link"; done
mount --bind "$work/plain-usr" "$sysroot/usr"
# Does what node-image-pivot-carry.service does. carry.sh runs with only the tools of the initramfs.
carry() {
    chroot "$root" /bin/sh /usr/lib/node-image-pivot/carry.sh begin
    status=0
    chroot "$sysroot" /run/node-image-pivot/bin/node-image-pivot --version > "$work/version" 2>&1 || status=$?
    EXIT_STATUS=$status chroot "$root" /bin/sh /usr/lib/node-image-pivot/carry.sh end
}
output=$(carry)
test "$output" = "node-image-pivot: carried the agent into the real root" || { echo "$output" >&2; exit 1; }
for unit in pivotd pull overlay finish; do
    grep -q '^ExecStart=/run/node-image-pivot/bin/node-image-pivot ' "$root/run/systemd/system/node-image-$unit.service"
done
test -e "$root/run/systemd/system/node-image-overlay.target"
test -x "$root/run/systemd/system-generators/node-image-pivot-generator"
mountpoint -q "$sysroot/run" && { echo "carry.sh left a mount on the real root" >&2; exit 1; }

# Without libostree the agent cannot run, and nothing of it is carried.
rm -rf "$root/run"
mount -t tmpfs tmpfs "$sysroot/usr"
mkdir "$sysroot/usr/bin"
: > "$sysroot/usr/bin/skopeo"
output=$(carry)
test "$output" = "node-image-pivot: the agent cannot run in the real root (status 127); the boot continues without the agent" ||
    { echo "$output" >&2; exit 1; }
test -z "$(find "$root/run" -name '*node-image*')" || { find "$root/run" >&2; exit 1; }
