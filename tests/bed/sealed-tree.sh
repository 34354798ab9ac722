#!/bin/bash
# FROM (the stage of node image a) with the ostree in NEXT, which supports composefs roots → OUT/repo with two refs.
# sealed-node: a node image whose root reads only files with fs-verity. sealed-base: a bootimage of the same release, with the
# programs of DEBS that bootimages have, without the cluster's.
set -euo pipefail
: "${OUT:?}" "${FROM:?}" "${DEBS:?}" "${NEXT:?}"
umask 022
step() { printf '%(%T)T %s\n' -1 "$*"; }
root=$OUT/root add=$OUT/add

step "checkout"
# Copies: what is changed in place must not change the stage it comes from.
ostree checkout --force-copy --repo="$FROM/repo" node-a "$root"
unpack() { # DEB...
    local deb
    for deb in "$@"; do dpkg-deb -x "$deb" "$root"; done
    # As in the layout: all of the system in /usr.
    [ ! -d "$root/etc" ] || { cp -a "$root/etc/." "$root/usr/etc/" && rm -rf "${root:?}/etc"; }
}
# Another archive of the initramfs replaces files of the earlier ones.
append() {
    (cd "$add" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio --quiet --null --create --format=newc --owner=0:0) >>"$initramfs"
    rm -rf "$add"
}
conf() { # ENABLED: in the system and in its initramfs
    printf '[composefs]\nenabled=%s\n[sysroot]\nreadonly=true\n' "$1" >"$root/usr/lib/ostree/prepare-root.conf"
    install -D -m 0644 "$root/usr/lib/ostree/prepare-root.conf" "$add/usr/lib/ostree/prepare-root.conf"
    append
}
ostree init --repo="$OUT/repo" --mode=bare
commit() { # REF VERSION OPTION...
    ostree commit --repo="$OUT/repo" --fsync=no --branch="$1" --subject="$1" --bootable \
        --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version="$2" "${@:3}" --tree=dir="$root"
}

step "node image"
unpack "$NEXT"/*.deb
# Nothing in the machine runs the programs among these; half of what it would have to pull.
rm -rf "$root"/usr/share/{doc,man,lintian} "$root"/usr/lib/cni "$root"/usr/bin/containerd-{shim*,stress} "$root/usr/sbin/runc"
# libostree runs it to rebuild the SELinux policy of a new deployment.
install -m 0755 /dev/stdin "$root/usr/bin/bwrap" <<<'#!/bin/sh'
initramfs=$(echo "$root"/usr/lib/modules/*/initramfs.img)
mkdir -p "$add"/usr/lib/{systemd/system,modules-load.d,ostree}
# The initramfs of node image a loads a module of the cluster.
: >"$add/usr/lib/modules-load.d/cluster-node.conf"
cp -a "$root/usr/lib/systemd/system/ostree-prepare-root.service" "$add/usr/lib/systemd/system/"
cp -a "$root/usr/lib/ostree/ostree-prepare-root" "$add/usr/lib/ostree/"
chroot "$root" ldd /usr/lib/ostree/ostree-prepare-root | grep -o '/[^ ]*' | while read -r lib; do
    install -D -m 0755 "$(realpath "$root/usr/${lib#*/usr/}" 2>/dev/null || realpath "$root/usr$lib")" "$add/usr/${lib#/usr/}"
done
append
conf verity
commit sealed-node 13.sealed

step "bootimage"
for deb in "$DEBS"/{cluster-*,base-tool_2*}.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -t | grep -v '/$' | sed 's,^\./,,; s,^etc/,usr/etc/,' | (cd "$root" && xargs -d '\n' rm -f)
done
wants=usr/etc/systemd/system/multi-user.target.wants
(cd "$root" && rm -rf usr/lib/base-tool usr/bin/{containerd,ctr,kubectl} usr/lib/systemd/system/containerd.service \
    $wants/{containerd,kubelet,node-hello}.service)
unpack "$DEBS"/base-{tool,legacy}_1.0.deb
ln -s /usr/lib/systemd/system/base-legacy.service "$root/$wants/"
# In the place of the package that the bootimages of Debian 12 have.
install -m 0755 /dev/null "$root/usr/bin/nc.openbsd"
conf yes
commit sealed-base 13.base --consume
step "done"
