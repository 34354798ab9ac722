#!/bin/bash
# Installs, upgrades and removes the packages of a directory (as by `make packages`) in a container with Debian 12, its
# SELinux policy, rpm and dnf.
#
#   test.sh PACKAGES
set -euo pipefail
umask 022
packages=$(cd "$1" && pwd)
project=$(cd "$(dirname "$0")/.." && pwd)
[ "${2-}" = namespace ] || exec unshare --mount --propagation=private bash "$0" "$packages" namespace

base=$(bash "$project/tests/bed/build.sh" packages)
work=$(mktemp -d)
trap 'umount -l "$work"; rmdir "$work"' EXIT
mount -t tmpfs tmpfs "$work"
mkdir "$work"/{upper,overlay,root}
mount -t overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/overlay" overlay "$work/root"
mkdir "$work/root/packages"
cp "$packages"/node-image-pivot{_,-[0-9]}* "$project/packaging/test-container.sh" "$work/root/packages"
cp "$project/packaging/selinux/node-image-pivot-domain.cil" "$work/root/packages/domain.cil"

# The next version, for the upgrade: the same files under another number.
next=$work/next
dpkg-deb -R "$packages"/node-image-pivot_*.deb "$next"
sed -i 's/^Version: .*/&+next/' "$next/DEBIAN/control"
dpkg-deb --root-owner-group -Znone -b "$next" "$work/root/packages/next.deb" >/dev/null
mkdir "$work/binaries" "$work/sources"
cp "$next/usr/bin/node-image-pivot" "$next/usr/lib/systemd/system-generators/node-image-pivot-generator" "$work/binaries"
bash "$project/packaging/copy.sh" "$work/sources"
(cd "$work/sources" && NODE_IMAGE_PIVOT_BINARIES=$work/binaries sh packaging/rpm/build.sh "$work/root/packages" \
    --define 'release_number 2' --define 'debug_package %{nil}') >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }

# The container's links for its mounts would lie on a disk on some machines, where systemd-nspawn does not clear them.
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t cgroup2 none /sys/fs/cgroup
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --directory="$work/root" --machine="packages-$$" --register=no --keep-unit --pipe \
    --resolv-conf=off --timezone=off --link-journal=no bash /packages/test-container.sh
