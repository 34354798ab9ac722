#!/bin/bash
# Builds the packages twice from a source archive, without a network. The second build has another directory, umask, time
# zone, language and home directory. Fails if the packages differ.
#
#   reproduce.sh ARCHIVE WORK
set -euo pipefail
archive=$(realpath "$1")
rm -rf "$2"
mkdir -p "$2"
work=$(cd "$2" && pwd)

build() { # NAME UMASK VARIABLE=VALUE...
    local name=$1 mask=$2
    shift 2
    mkdir -p "$work/$name/home"
    tar --extract --xz --directory "$work/$name" --file "$archive"
    cd "$work/$name/"node-image-pivot-*
    env -i PATH="$PATH" RUSTUP_HOME="${RUSTUP_HOME:-$HOME/.rustup}" HOME="$work/$name/home" CARGO_HOME="$work/$name/home/cargo" \
        "$@" unshare --net bash -c "umask $mask; exec make packages PACKAGES='$work/$name/packages'"
    rm -rf "$work/$name/"node-image-pivot-*
}
build first 022 TZ=UTC LC_ALL=C.UTF-8
build a/second/directory 077 TZ=Asia/Kathmandu LC_ALL=C
diff -r "$work/first/packages" "$work/a/second/directory/packages"
echo "both builds give the same packages: $work/first/packages"
