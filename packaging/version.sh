#!/bin/sh
# Prints the version of the project, if Cargo.toml, Cargo.lock, the RPM, the Debian package and the changelog agree on it.
#
#   version.sh [TAG]    TAG: fails unless it is v and this version, and the changelog has a heading for it
set -eu
cd "$(dirname "$0")/.."

# shows NAME COMMAND...: the version in a file, from the output of the command.
versions=
shows() {
    name=$1
    shift
    found=$("$@" | head -n 1)
    [ -n "$found" ] || {
        echo "cannot find the version in $name" >&2
        exit 1
    }
    versions="$versions$found $name
"
}
shows Cargo.toml sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml
shows Cargo.lock sed -n '/^name = "node-image-pivot"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock
shows packaging/rpm/node-image-pivot.spec sed -n 's/^Version: *//p' packaging/rpm/node-image-pivot.spec
shows packaging/debian/changelog sed -n '1s/^[^(]*(\([^)]*\)).*/\1/p' packaging/debian/changelog
version=${versions%% *}
echo "$versions" | while read -r found name; do
    [ -z "$found" ] || [ "$found" = "$version" ] || {
        echo "the version is $version in Cargo.toml, but $found in $name: write the same in all" >&2
        exit 1
    }
done
if [ $# -gt 0 ]; then
    [ "$1" = "v$version" ] || {
        echo "the tag $1 is not v$version, the version of the project: tag the commit that has the version" >&2
        exit 1
    }
    grep -q "^## \[$version\] - [0-9-]*$" CHANGELOG.md || {
        echo "CHANGELOG.md has no heading for $version with its date" >&2
        exit 1
    }
fi
echo "$version"
