#!/bin/sh
# Packages finished binaries as Debian packages and RPMs. lintian and rpmlint must report nothing. Equal binaries give equal
# packages: all times are that of the latest entry in packaging/debian/changelog, or SOURCE_DATE_EPOCH.
#
#   build.sh BINARIES OUTPUT
set -eu
umask 022
export LC_ALL=C.UTF-8 TZ=UTC
unset MAKEFLAGS MAKELEVEL
project=$(cd "$(dirname "$0")/.." && pwd -P)
binaries=$(cd "$1" && pwd)
output=$(realpath --canonicalize-missing "$2")
# The output directory is emptied, and the source tree is copied without target.
allowed=yes
case $output/ in "$project/target/"?*) ;; "$project/"*) allowed= ;; esac
case $project/ in "${output%/}/"*) allowed= ;; esac
[ -n "$allowed" ] || {
    echo "cannot write packages to $2: only target and directories outside the source tree are possible; name another one" >&2
    exit 1
}
sh "$project/packaging/version.sh" >/dev/null
rm -rf "$output"
mkdir -p "$output"
work=$output/work
sources=$work/node-image-pivot
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(dpkg-parsechangelog -l "$project/packaging/debian/changelog" -S Timestamp)}
export SOURCE_DATE_EPOCH

# quiet NAME COMMAND...: shows the command's output only if it fails.
quiet() {
    name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 || {
        tail -n 40 "$work/$name.log" >&2
        echo "cannot build the packages: $name failed; the log is $work/$name.log" >&2
        exit 1
    }
}

mkdir -p "$sources" "$work/binaries"
cp "$binaries/node-image-pivot" "$binaries/node-image-pivot-generator" "$work/binaries"
export NODE_IMAGE_PIVOT_BINARIES="$work/binaries"
if grep -q NODE_IMAGE_PIVOT_FAILPOINTS "$work/binaries/node-image-pivot"; then
    echo "cannot package $binaries/node-image-pivot: it has the failpoints of the tests; run make build" >&2
    exit 1
fi
# Binaries without debug information are stripped here, as neither tool makes an empty debug package.
debug_rpm=
if ! objdump --section-headers "$work/binaries/node-image-pivot" | grep -q '\.debug_info'; then
    export DEB_BUILD_OPTIONS="${DEB_BUILD_OPTIONS:-} noautodbgsym"
    debug_rpm='debug_package %{nil}'
    strip "$work/binaries/"*
fi

# The builds write to a copy, never to the checkout.
bash "$project/packaging/copy.sh" "$sources"
cp -r "$sources/packaging/debian" "$sources/debian"
cd "$sources"

quiet dpkg-buildpackage dpkg-buildpackage --build=binary --no-sign
rm -rf debian
mv "$work"/*.deb "$output"

quiet rpmbuild sh packaging/rpm/build.sh "$output" ${debug_rpm:+--define "$debug_rpm"}

cd "$output"
quiet lintian lintian --allow-root --fail-on error,warning ./*.deb
quiet rpmlint rpmlint --strict --config "$project/packaging/rpm/rpmlint.toml" ./*.rpm "$sources/packaging/rpm/node-image-pivot.spec"
rm -rf "$work"
sha256sum -- *
