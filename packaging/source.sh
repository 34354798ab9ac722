#!/bin/bash
# Packs the sources of a checkout with all crates that they need, so that they build without a network. Files that git does
# not track are left out. Equal sources give an equal archive: times and owners are fixed as in build.sh.
#
#   source.sh OUTPUT
set -euo pipefail
umask 022
export LC_ALL=C.UTF-8
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
output=$(cd "$1" && pwd)
version=$(dpkg-parsechangelog -l "$project/packaging/debian/changelog" -S Version)
epoch=${SOURCE_DATE_EPOCH:-$(dpkg-parsechangelog -l "$project/packaging/debian/changelog" -S Timestamp)}
name=node-image-pivot-$version
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/$name" "$work/$name/.cargo"
cd "$project"
git ls-files -z --cached | tar --create --null --files-from=- | tar --extract --directory "$work/$name"
cd "$work/$name"
"${CARGO:-cargo}" vendor --locked vendor >.cargo/config.toml 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
cd "$work"
tar --create --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner --mode=u+rw,go=u-w --format=gnu "$name" |
    xz --threads=2 -3 >"$output/$name.tar.xz"
