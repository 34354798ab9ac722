#!/bin/bash
# Installs what the test bed and the build need on a Debian 12 machine. Quick when nothing is to do.
set -euo pipefail

# Build: libostree for the agent, zstd for the oracle (ostree-ext asks pkg-config for it).
# Trees: mmdebstrap, dpkg-dev, ostree, squashfs; xorriso for ISO media. Run: nspawn, a registry, a DHCP server, skopeo, ssh;
# QEMU itself comes by build.sh.
# umoci unpacks images to compare with.
packages=(
    build-essential pkg-config cmake clang libostree-dev libssl-dev libzstd-dev
    mmdebstrap dpkg-dev debian-archive-keyring ostree squashfs-tools erofs-utils xfsprogs e2fsprogs btrfs-progs fdisk xorriso cpio jq curl
    systemd-container dbus iproute2 openssh-client dnsmasq-base docker-registry apache2-utils skopeo umoci gnupg openssl
)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "${missing[@]}"
fi
