#!/bin/bash
# PACKAGES of the release of the tree REF in REPO, with the dependencies that the tree lacks: OUT has their files. SHARE:
# what stays of /usr/share.
# Only extracted, never installed: the host's packages and apt sources stay as they are.
set -euo pipefail
: "${OUT:?}" "${REPO:?}" "${REF:?}" "${PACKAGES:?}" "${SHARE=}"
umask 022
apt=$OUT/apt
mkdir -p "$apt"/{etc/apt,var/lib/apt/lists/partial,var/cache/apt/archives/partial}
# What the tree has installed is installed as far as apt can see: it fetches the rest.
ostree cat --repo="$REPO" "$REF" /usr/lib/sysimage/dpkg/status >"$apt/status"
# From where the tree came.
ostree cat --repo="$REPO" "$REF" /usr/etc/apt/sources.list >"$apt/etc/apt/sources.list"
get() {
    apt-get -q -o Dir="$apt" -o Dir::State::Status="$apt/status" -o Dir::Etc::TrustedParts=/usr/share/keyrings -o APT::Sandbox::User=root \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false "$@"
}
get update
# shellcheck disable=SC2086 # names
get install --yes --download-only --no-install-recommends $PACKAGES
for deb in "$apt"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$deb" "$OUT"; done
# Older packages still name directories that are links in the tree.
for dir in lib bin sbin; do
    [ ! -d "$OUT/$dir" ] || { mkdir -p "$OUT/usr/$dir" && cp -a "$OUT/$dir/." "$OUT/usr/$dir/" && rm -rf "${OUT:?}/$dir"; }
done
mkdir -p "$OUT/usr/share" "$OUT/share"
for name in $SHARE; do mv "$OUT/usr/share/$name" "$OUT/share/"; done
# Half of it, for users and developers that are not there. /var starts empty.
rm -rf "$apt" "${OUT:?}/usr/share" "${OUT:?}/var" "$OUT"/usr/lib*/podman/{rootlessport,podman-testing} "$OUT"/usr/lib/*/*.a
mv "$OUT/share" "$OUT/usr/share"
du -sh "$OUT"
