#!/bin/bash
# A node image that is the bootimage's own tree with little more → OUT/repo with the ref node-small. What it leaves as it
# is shows what the agent leaves out; what it adds is named below.
set -euo pipefail
: "${OUT:?}" "${BASE:?}" "${BINARIES:?}"
umask 022
new=$OUT/new
put() { install -D -m "$2" /dev/stdin "$new/$1"; }

mkdir -p "$new/usr"
cp -a "$BINARIES/usr/." "$new/usr/"
# A package of /opt, and one's skeleton of /var: neither is named in any tmpfiles.d.
put usr/lib/opt/cni/bin/bridge 755 <<<$'#!/bin/sh\necho bridge of the node image'
put usr/share/factory/var/lib/small-app/data 640 <<<"from the factory"
# What machines write to is left alone.
put usr/share/factory/var/lib/kept-app/data 644 <<<"from the factory"
# Read at boot only. The value is the network namespace's own; the second file asks for no module.
put usr/etc/sysctl.d/70-small.conf 644 <<<"net.ipv4.ip_default_ttl = 63"
put usr/etc/modules-load.d/small.conf 644 <<<"# nothing"
# Two new units: the image's maker enabled one of them. Presets would enable both, and what is in no preset file as well.
for unit in small-enabled small-disabled; do
    put usr/lib/systemd/system/$unit.service 644 <<<$'[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target'
done
put usr/lib/systemd/system-preset/10-small.preset 644 <<<"enable small-*.service"
mkdir -p "$new/usr/etc/systemd/system/multi-user.target.wants"
ln -s /usr/lib/systemd/system/small-enabled.service "$new/usr/etc/systemd/system/multi-user.target.wants/small-enabled.service"
put usr/lib/node-image-pivot/pre-switch.d/50-image 755 <<<$'#!/bin/sh\necho runs too late to refuse anything; exit 1'
put usr/lib/node-image-pivot/post-switch.d/50-image 755 <<<$'#!/bin/sh\necho hook of the node image'

ostree init --repo="$OUT/repo" --mode=bare
ostree pull-local --disable-fsync --repo="$OUT/repo" "$BASE/repo" base12
ostree commit --repo="$OUT/repo" --fsync=no --branch=node-small --subject=node-small --bootable \
    --timestamp='2026-01-01 00:00:00 +0000' --add-metadata-string=version=12.small \
    --owner-uid=0 --owner-gid=0 --tree=ref=base12 --tree=dir="$new"
rm -rf "$new"
