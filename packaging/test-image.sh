#!/bin/bash
# Builds packaging/Containerfile on an image with Debian 12, with the packages of a directory.
#
#   test-image.sh PACKAGES
set -euo pipefail
umask 022
packages=$(cd "$1" && pwd)
project=$(cd "$(dirname "$0")/.." && pwd)
base=$(bash "$project/tests/bed/build.sh" packages)
work=$(mktemp -d)
store() { buildah --root "$work/root" --runroot "$work/run" --storage-driver overlay "$@"; }
trap 'store rm --all >/dev/null; store rmi --all --force >/dev/null; rm -rf --one-file-system "$work"' EXIT

tar --create --directory "$base" --exclude='./dev/*' --file "$work/base.tar" .
container=$(store from scratch)
store add --quiet "$container" "$work/base.tar" / >/dev/null
rm "$work/base.tar"
store commit --quiet "$container" localhost/base >/dev/null
store bud --isolation chroot --pull-never --build-arg BASE=localhost/base --tag localhost/layered \
    --file "$project/packaging/Containerfile" "$packages" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
grep -x 'node-image-pivot [0-9.]*' "$work/log"
