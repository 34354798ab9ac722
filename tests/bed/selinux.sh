#!/bin/bash
# FROM (a tree stage, ref REF) without DROP (patterns), with FILES on top and its SELinux policy turned on, MODULES (CIL)
# included; every file labelled by it → OUT/repo, ref TREE.
set -euo pipefail
: "${OUT:?}" "${FROM:?}" "${REF:?}" "${TREE:?}" "${MODULES:?}"
umask 022
step() { printf '%(%T)T %s\n' -1 "$*"; }
root=$OUT/root

step "checkout"
# Copies: what is changed in place must not change the stage it comes from.
ostree checkout --force-copy --repo="$FROM/repo" "$REF" "$root"
mv "$root/usr/etc" "$root/etc"
# shellcheck disable=SC2086 # patterns, without spaces
(cd "$root" && rm -rf ${DROP:-})
for dir in ${FILES:-}; do cp -a --no-preserve=ownership "$dir/." "$root/"; done

step "policy"
config=$root/etc/selinux
sed -i 's/^SELINUX=.*/SELINUX=enforcing/' "$config/config"
# As on other ostree systems: modules are part of the system's defaults, not of its state.
echo 'store-root=/etc/selinux' >>"$config/semanage.conf"
cat >>"$config/default/contexts/files/file_contexts.subs_dist" <<'SUBS'
/usr/etc /etc
/var/home /home
/var/roothome /root
/var/opt /opt
/var/srv /srv
/var/usrlocal /usr/local
/sysroot/ostree /ostree
SUBS
mkdir -p "$root/var/tmp" "$root/modules"
# shellcheck disable=SC2086 # paths without spaces
cp $MODULES "$root/modules/"
# Debian's set, as its package installs it; and ours on top.
mapfile -t modules < <(sed 's|.*|--install=/usr/share/selinux/default/&.pp.bz2|' "$root/usr/share/selinux/default/.modules")
local_modules=("$root"/modules/*.cil)
chroot "$root" semodule --noreload --store=default --priority=100 "${modules[@]}" \
    --priority=200 "${local_modules[@]/#$root/--install=}"
rm -rf "${root:?}/modules" "${root:?}/var/tmp" "$root/usr/share/selinux/default"/*.pp.bz2 "$config"/default/semanage.*.LOCK
mv "$root/etc" "$root/usr/etc"

step "commit"
ostree init --repo="$OUT/repo" --mode=bare
ostree commit --repo="$OUT/repo" --fsync=no --branch="$TREE" --subject="$TREE: $REF with SELinux" --bootable \
    --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version=selinux \
    --selinux-policy="$root" --consume --tree=dir="$root"
rm -rf "$root"
step "done"
