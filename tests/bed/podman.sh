#!/bin/bash
# podman with runc, conmon and netavark of its release, for the tree REF in REPO: OUT has what the tree lacks, unpacked.
# Only extracted, never installed: the host's packages and apt sources stay as they are.
set -euo pipefail
: "${OUT:?}" "${REPO:?}" "${REF:?}"
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
# Not crun: it runs nothing where limits may not be raised, and a machine that runs tests may be such a place. Without a
# network backend that both releases know, the newer podman would not start on what the older one stored.
get install --yes --download-only --no-install-recommends podman runc netavark
for deb in "$apt"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$deb" "$OUT"; done
# Older packages still name directories that are links in the tree.
[ ! -d "$OUT/lib" ] || { cp -a "$OUT/lib/." "$OUT/usr/lib/" && rm -rf "${OUT:?}/lib"; }
# Half of it, for users and developers that are not there.
rm -rf "$apt" "${OUT:?}/usr/share" "$OUT"/usr/lib*/podman/{rootlessport,podman-testing} "$OUT"/usr/lib/*/*.a
du -sh "$OUT"
