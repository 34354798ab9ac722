#!/bin/bash
# The test bed's own packages: what has to differ between bootimage and node image in a known way.
# base-tool 1.0 → 2.0 (updated), base-legacy (removed), cluster-client and cluster-node (added).
set -euo pipefail
: "${OUT:?}" "${BED:?}"
umask 022
work=$OUT/work

# pack NAME VERSION: the tree in $work becomes OUT/NAME_VERSION.deb
pack() {
    mkdir -p "$work/DEBIAN"
    printf 'Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: test bed <testbed@example.test>\nDescription: %s of the test bed\n' \
        "$1" "$2" "$1" >"$work/DEBIAN/control"
    dpkg-deb --root-owner-group -Zgzip --build "$work" "$OUT/$1_$2.deb"
    rm -rf "$work"
}
# put PATH MODE: standard input becomes a file of the package
put() { install -D -m "$2" /dev/stdin "$work/$1"; }

for version in 1.0 2.0; do
    put usr/bin/base-tool 755 <<<$'#!/bin/sh\n'"echo base-tool $version"
    put usr/lib/base-tool/data 644 <<<"data of $version"
    put etc/base-tool/changed-default.conf 644 <<<"default of $version"
    put etc/base-tool/admin-edited.conf 644 <<<"default of $version"
    put etc/base-tool/admin-removed.conf 644 <<<"default of $version"
    put etc/base-tool/same.conf 644 <<<"the same in both"
    if [ "$version" = 1.0 ]; then
        put usr/lib/base-tool/only-in-1 644 <<<"goes away"
        put etc/base-tool/removed-default.conf 644 <<<"goes away"
        put usr/lib/base-tool/becomes-dir 644 <<<"a file in 1.0, a directory in 2.0"
    else
        put usr/lib/base-tool/only-in-2 644 <<<"arrives"
        put etc/base-tool/new-default.conf 644 <<<"arrives"
        put usr/lib/base-tool/becomes-dir/file 644 <<<"a file in 1.0, a directory in 2.0"
    fi
    pack base-tool "$version"
done

# A service that only the bootimage has, wanted by a link in /etc.
put usr/bin/base-legacy 755 <<<$'#!/bin/sh\nexec sleep infinity'
put etc/base-legacy.conf 644 <<<"legacy=yes"
put usr/lib/systemd/system/base-legacy.service 644 <<'UNIT'
[Unit]
Description=Service that only the bootimage has
[Service]
ExecStart=/usr/bin/base-legacy
[Install]
WantedBy=multi-user.target
UNIT
pack base-legacy 1.0

# The cluster's own programs: compiled here, static enough to run on either release (built against this machine's libc).
export CLUSTER_VERSION=4.99.0
for program in oc kubelet; do
    mkdir -p "$work"
    rustc --edition 2024 -O -C strip=symbols -C target-feature=+crt-static -o "$work/$program" "$BED/programs/$program.rs"
done
mv "$work/kubelet" "$OUT/kubelet"
install -D -m 755 "$work/oc" "$work/usr/bin/oc" && rm "$work/oc"
pack cluster-client "$CLUSTER_VERSION"

install -D -m 755 "$OUT/kubelet" "$work/usr/bin/kubelet" && rm "$OUT/kubelet"
put etc/kubernetes/kubelet.conf 644 <<<"healthz=127.0.0.1:10248"
put usr/lib/sysusers.d/cluster-node.conf 644 <<<'u kubelet-svc 501 "Cluster node service" /var/lib/kubelet-svc'
put usr/lib/tmpfiles.d/cluster-node.conf 644 <<'TMPFILES'
d /var/lib/kubelet-svc 0750 kubelet-svc kubelet-svc -
d /run/kubelet-svc 0755 kubelet-svc kubelet-svc -
f /run/kubelet-svc/created-by-tmpfiles 0644 kubelet-svc kubelet-svc - yes
TMPFILES
put usr/lib/sysctl.d/60-cluster-node.conf 644 <<<'vm.overcommit_memory = 1'
put usr/lib/modules-load.d/cluster-node.conf 644 <<<'dummy'
put usr/lib/systemd/system/kubelet.service 644 <<'UNIT'
[Unit]
Description=Cluster node agent
After=containerd.service
[Service]
Type=notify
ExecStart=/usr/bin/kubelet --config /etc/kubernetes/kubelet.conf
Restart=on-failure
[Install]
WantedBy=multi-user.target
UNIT
# User= a user that only the node image's sysusers.d knows; a directory that only its tmpfiles.d makes.
put usr/lib/systemd/system/node-hello.service 644 <<'UNIT'
[Unit]
Description=Says hello from the node image
[Service]
Type=notify
User=kubelet-svc
WorkingDirectory=/var/lib/kubelet-svc
ExecStart=/usr/bin/kubelet hello --listen 127.0.0.1:8080
[Install]
WantedBy=multi-user.target
UNIT
pack cluster-node "$CLUSTER_VERSION"
ls -l "$OUT"
