#!/bin/bash
# A Debian tree in ostree layout, committed: SUITE, TREE (ref and name), PACKAGES (lists), DEBS (own packages).
# OUT/repo holds it, OUT/packages.tsv says what is in it.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${SUITE:?}" "${TREE:?}" "${PACKAGES:?}"
umask 022
export BED
# The test bed makes the initramfs once, with what these machines need: keep the kernel package from making one.
export INITRD=No
root=$OUT/root

include=$(for list in $PACKAGES; do grep -hv '^#' "$BED/packages/$list"; done | tr -s ' \n' ',,' | sed 's/^,//;s/,$//')
options=(
    --mode=root --variant=minbase --format=directory
    # The trees need no manuals; every file costs time in a commit, a chunk and an import.
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*'
    --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/zoneinfo/*'
    --essential-hook="bash '$BED/tree/ids.sh' \"\$1\""
    --include="$include"
)
# skopeo drags the network plugins in; a bootimage has no container network.
[ "$TREE" != base12 ] || options+=(--dpkgopt='path-exclude=/usr/lib/cni/*')
# The bootimage is the release as it was published; the node image has all later updates. The skew is a real one.
[ "$TREE" != base12 ] || options+=(--setup-hook='sed -i "/security\|updates/d" "$1/etc/apt/sources.list"')
for deb in ${DEBS:-}; do
    options+=(--customize-hook="copy-in '$deb' /var/tmp" --customize-hook="chroot \"\$1\" dpkg -i '/var/tmp/${deb##*/}'")
done
options+=(--customize-hook="bash '$BED/tree/configure.sh' \"\$1\"")
options+=(--customize-hook="bash '$BED/tree/initramfs.sh' \"\$1\"")

step() { printf '%(%T)T %s\n' -1 "$*"; }
step "mmdebstrap $SUITE"
mmdebstrap "${options[@]}" "$SUITE" "$root"
dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${Package}\t${Version}\n' >"$OUT/packages.tsv"
step "ostree layout"
bash "$BED/tree/ostree-layout.sh" "$root"
step "commit"
ostree init --repo="$OUT/repo" --mode=bare
version=$(. "$root/usr/lib/os-release" && cat "$root/usr/share/base-files/debian_version" 2>/dev/null || echo "$VERSION_ID")
# --consume moves the files; a fixed time makes the same tree the same commit.
ostree commit --repo="$OUT/repo" --branch="$TREE" --subject="$TREE: Debian $SUITE" --timestamp='2026-01-01 00:00:00 +0000' \
    --add-metadata-string=version="$version" --bootable --consume --tree=dir="$root"
rm -rf "$root"
step "done"
