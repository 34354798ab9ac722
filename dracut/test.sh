#!/bin/sh
# Makes a real initramfs with the module, unpacks it, and runs in it what the initramfs would run.
# Needs root (for a private view of /usr), dracut and make. Leaves nothing behind.
set -eu

if [ "${1-}" != inside ]; then
    project=$(dirname "$(dirname "$(readlink -f "$0")")")
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Stand-ins: what is tested is where things go, not what they do.
    mkdir "$work/build"
    for name in node-image-pivot node-image-pivot-generator; do
        printf '#!/bin/sh\necho %s\n' "$name" > "$work/build/$name"
        # The manual page and the completions are what the program itself prints.
        chmod 0755 "$work/build/$name"
    done
    make -s -C "$project" install DESTDIR="$work/installed" BUILD="$work/build"
    # A private mount namespace shows the installation in this machine's /usr to dracut only.
    unshare --mount --propagation private sh "$0" inside "$work"
    echo "dracut: the module carries a working set"
    exit
fi

work=$2
mount -t overlay -o "lowerdir=$work/installed/usr:/usr" overlay /usr
dracut --quiet --force --no-hostonly --no-kernel --kver 0-none --no-compress --no-early-microcode --nofscks \
    --modules "base systemd systemd-initrd node-image-pivot" "$work/initramfs.img" 2> "$work/log" ||
    { cat "$work/log" >&2; exit 1; }
mkdir "$work/root"
(cd "$work/root" && cpio --quiet -idm < "$work/initramfs.img")
test -L "$work/root/usr/lib/systemd/system/initrd.target.wants/node-image-pivot-carry.service"

# The whole of it, with the initramfs's own tools: only what install() brought is there.
chroot "$work/root" /bin/sh /usr/lib/node-image-pivot/carry.sh
for unit in pivotd pull overlay finish; do
    case $unit in pivotd) name=node-image-pivotd ;; *) name=node-image-$unit ;; esac
    grep -q '^ExecStart=/run/node-image-pivot/bin/node-image-pivot ' "$work/root/run/systemd/system/$name.service"
done
test -e "$work/root/run/systemd/system/node-image-overlay.target"
test "$(chroot "$work/root" /run/node-image-pivot/bin/node-image-pivot)" = node-image-pivot
test "$(chroot "$work/root" /run/systemd/system-generators/node-image-pivot-generator)" = node-image-pivot-generator
