#!/bin/bash
# FROM (the stage of node image a) with the ostree in NEXT, which supports composefs roots → OUT/repo with two refs.
# sealed-base: a bootimage without the cluster's programs. sealed-node: the same with these programs of DEBS, and more; its
# root reads only files with fs-verity.
set -euo pipefail
: "${OUT:?}" "${FROM:?}" "${DEBS:?}" "${NEXT:?}"
umask 022
step() { printf '%(%T)T %s\n' -1 "$*"; }
root=$OUT/root new=$OUT/new

step "checkout"
# Copies: what is changed in place must not change the stage it comes from.
ostree checkout --force-copy --repo="$FROM/repo" node-a "$root"
for deb in "$DEBS"/{cluster-*,base-tool_2*}.deb; do
    # As in the layout: all of the system in /usr.
    dpkg-deb --fsys-tarfile "$deb" | tar -t | grep -v '/$' | sed 's,^\./,,; s,^etc/,usr/etc/,' | (cd "$root" && xargs -d '\n' rm -f)
done
# A file in the one release, a directory in the other.
rm -rf "$root/usr/lib/base-tool"
(cd "$root" && rm -rf usr/lib/cni usr/bin/{containerd*,ctr,kubectl,runc} usr/sbin/runc \
    usr/etc/systemd/system/multi-user.target.wants/{containerd,kubelet,node-hello}.service usr/lib/systemd/system/containerd.service)

step "packages"
unpack() { # DIRECTORY DEB...
    local dir=$1 deb
    shift
    for deb in "$@"; do dpkg-deb -x "$deb" "$dir"; done
    [ ! -d "$dir/etc" ] || { mkdir -p "$dir/usr/etc" && cp -a "$dir/etc/." "$dir/usr/etc/" && rm -rf "${dir:?}/etc"; }
}
unpack "$root" "$NEXT"/*.deb "$DEBS/base-tool_1.0.deb"
rm -rf "$root"/usr/share/{doc,man,lintian}
# libostree runs it to rebuild the SELinux policy of a new deployment.
install -m 0755 /dev/stdin "$root/usr/bin/bwrap" <<<'#!/bin/sh'
conf() { printf '[composefs]\nenabled=%s\n[sysroot]\nreadonly=true\n' "$1"; }
conf yes >"$root/usr/lib/ostree/prepare-root.conf"

step "initramfs"
# Appended to the tree's own one, so that all else in it stays as it is.
append() { (cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio --quiet --null --create --format=newc --owner=0:0); }
initramfs=$(echo "$root"/usr/lib/modules/*/initramfs.img)
add=$OUT/add
mkdir -p "$add"/usr/lib/{systemd/system,modules-load.d}
# The initramfs of node image a loads a module of the cluster.
: >"$add/usr/lib/modules-load.d/cluster-node.conf"
cp -a "$root/usr/lib/systemd/system/ostree-prepare-root.service" "$add/usr/lib/systemd/system/"
chroot "$root" ldd /usr/lib/ostree/ostree-prepare-root | grep -o '/[^ ]*' | while read -r lib; do
    install -D -m 0755 "$(realpath "$root/usr/${lib#*/usr/}" 2>/dev/null || realpath "$root/usr$lib")" "$add/usr/${lib#/usr/}"
done
mkdir -p "$add/usr/lib/ostree"
cp -a "$root"/usr/lib/ostree/{ostree-prepare-root,prepare-root.conf} "$add/usr/lib/ostree/"
append "$add" >>"$initramfs"

step "node image"
unpack "$new" "$DEBS"/base-tool_2*.deb
# It has a directory in the place of a file, which a commit of two trees cannot have.
rm -rf "$new/usr/lib"
mkdir -p "$OUT/cluster" && unpack "$OUT/cluster" "$DEBS"/cluster-*.deb
cp -a "$OUT"/cluster/usr/bin/{kubelet,oc} "$new/usr/bin/"
mkdir -p "$new/usr/lib/ostree"
conf verity >"$new/usr/lib/ostree/prepare-root.conf"
install -D -m 0600 "$initramfs" "$new/${initramfs#"$root"/}"
rm -rf "$add" && install -D -m 0644 "$new/usr/lib/ostree/prepare-root.conf" "$add/usr/lib/ostree/prepare-root.conf"
append "$add" >>"$new/${initramfs#"$root"/}"

step "commit"
ostree init --repo="$OUT/repo" --mode=bare
commit() { # REF VERSION TREE...
    ostree commit --repo="$OUT/repo" --fsync=no --branch="$1" --subject="$1" --bootable \
        --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version="$2" "${@:3}"
}
commit sealed-base 13.base --consume --tree=dir="$root"
commit sealed-node 13.sealed --tree=ref=sealed-base --tree=dir="$new"
rm -rf "$root" "$new" "$add" "$OUT/cluster"
step "done"
