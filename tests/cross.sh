#!/bin/bash
# Builds for another architecture with Debian's cross compiler, and runs tests under QEMU's user emulation.
#
#   cross.sh ARCHITECTURE COMMAND...    architectures: aarch64 ppc64le s390x; command: cargo and its arguments
#
# PIVOT_CROSS   where the libraries of the architectures are (default target/cross)
set -euo pipefail
umask 022
architecture=$1
shift
case $architecture in
    aarch64) debian=arm64 rust=aarch64 gnu=aarch64 emulator=aarch64 ;;
    ppc64le) debian=ppc64el rust=powerpc64le gnu=powerpc64le emulator=ppc64le ;;
    s390x) debian=s390x rust=s390x gnu=s390x emulator=s390x ;;
    *)
        echo "unknown architecture \"$architecture\": expected aarch64, ppc64le or s390x" >&2
        exit 1 ;;
esac
project=$(cd "$(dirname "$0")/.." && pwd)
target=$rust-unknown-linux-gnu
triple=$gnu-linux-gnu
sysroot=${PIVOT_CROSS:-$project/target/cross}/$debian

packages=(mmdebstrap qemu-user-static pkg-config "gcc-${triple/_/-}" "libc6-dev-$debian-cross")
dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null | grep -cx installed | grep -qx "${#packages[@]}" || {
    apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}" >&2
}
# Only a toolchain of rustup can be without the standard library of another architecture.
if command -v rustup >/dev/null; then (cd "$project" && rustup --quiet target add "$target" >&2); fi

# The libraries are unpacked, not configured: nothing of them runs, apart from what QEMU loads. The release without its
# updates has all symbols that programs may need.
if [ ! -d "$sysroot" ]; then
    rm -rf --one-file-system "$sysroot.tmp"
    mkdir -p "$(dirname "$sysroot")"
    # shellcheck disable=SC2016 # expanded by mmdebstrap
    mmdebstrap --quiet --mode=root --variant=extract --architectures="$debian" --format=directory \
        --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --setup-hook='sed -i "/security\|updates/d" "$1/etc/apt/sources.list"' --include=libostree-dev,libc6-dev bookworm "$sysroot.tmp" >&2
    mv "$sysroot.tmp" "$sysroot"
fi
# The linker looks for the target of an absolute link, such as the loader's on ppc64le, on the machine that builds.
find "$sysroot/usr/lib"* -type l -lname '/*' | while read -r link; do
    ln --symbolic --relative --force --no-dereference "$sysroot$(readlink "$link")" "$link"
done

variable=${target//-/_}
export "CC_$variable=$triple-gcc" "AR_$variable=$triple-ar"
export "CARGO_TARGET_${variable^^}_LINKER=$triple-gcc"
# rustdoc links the tests in documentation.
for flags in RUSTFLAGS RUSTDOCFLAGS; do
    export "CARGO_TARGET_${variable^^}_$flags=-Clink-arg=--sysroot=$sysroot"
done
export "CARGO_TARGET_${variable^^}_RUNNER=qemu-$emulator-static -L $sysroot"
# The kernels of this architecture that matter have pages of 64 KiB.
if [ "$architecture" = ppc64le ]; then
    export QEMU_PAGESIZE=65536
    # Not every version of QEMU reads the variable.
    "$triple-gcc" -x c -o "$sysroot/has-large-pages" - <<<'#include <unistd.h>
int main(void) { return sysconf(_SC_PAGESIZE) != 65536; }'
    "qemu-$emulator-static" -L "$sysroot" "$sysroot/has-large-pages" || {
        echo "cannot test with pages of 64 KiB: this QEMU does not read QEMU_PAGESIZE; install QEMU 8 or earlier" >&2
        exit 1
    }
fi
export CARGO_BUILD_TARGET=$target PKG_CONFIG_ALLOW_CROSS=1 PKG_CONFIG_SYSROOT_DIR=$sysroot
export PKG_CONFIG_LIBDIR=$sysroot/usr/lib/$triple/pkgconfig:$sysroot/usr/share/pkgconfig
cd "$project"
exec "$@"
