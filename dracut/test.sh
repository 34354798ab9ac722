#!/bin/sh
# Builds an initramfs with the module, unpacks it, and runs carry.sh in it.
# Needs root (for a private view of /usr), dracut and make. Removes all files that it creates.
set -eu

if [ "${1-}" != inside ]; then
    project=$(dirname "$(dirname "$(readlink -f "$0")")")
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Stand-ins for the programs: the test checks only the destinations of the files.
    mkdir "$work/build"
    for name in node-image-pivot node-image-pivot-generator; do
        printf '#!/bin/sh\necho %s\n' "$name" > "$work/build/$name"
        # "make install" runs the program to generate the manual page and the completions.
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

# carry.sh runs with only the tools that install() added to the initramfs.
chroot "$work/root" /bin/sh /usr/lib/node-image-pivot/carry.sh
for unit in pivotd pull overlay finish; do
    case $unit in pivotd) name=node-image-pivotd ;; *) name=node-image-$unit ;; esac
    grep -q '^ExecStart=/run/node-image-pivot/bin/node-image-pivot ' "$work/root/run/systemd/system/$name.service"
done
test -e "$work/root/run/systemd/system/node-image-overlay.target"
test "$(chroot "$work/root" /run/node-image-pivot/bin/node-image-pivot)" = node-image-pivot
test "$(chroot "$work/root" /run/systemd/system-generators/node-image-pivot-generator)" = node-image-pivot-generator
