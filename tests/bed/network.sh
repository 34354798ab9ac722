#!/bin/bash
# FROM (packages of boot.sh, unpacked) with its units enabled and its users → OUT. What the packages' scripts would do.
set -euo pipefail
: "${OUT:?}" "${FROM:?}"
umask 022
cp -a "$FROM/." "$OUT/"
# Scripts of another init system, which systemctl would ask.
rm -rf "${OUT:?}/etc/init.d" "$OUT"/etc/rc*.d
systemctl --root="$OUT" enable NetworkManager.service NetworkManager-dispatcher.service \
    NetworkManager-wait-online.service dbus-broker.service chrony.service
put() { install -D -m 644 /dev/stdin "$OUT/$1"; }
put usr/lib/sysusers.d/testbed-network.conf <<<$'u polkitd - "polkit"\nu _chrony - "chrony"'
put usr/lib/tmpfiles.d/testbed-network.conf <<<$'d /var/lib/chrony 0750 _chrony _chrony -\nd /var/log/chrony 0755 _chrony _chrony -\nd /var/lib/NetworkManager 0700 root root -\nd /var/lib/polkit-1 0700 polkitd root -'
# The clock belongs to the machine that runs the tests.
put etc/default/chrony <<<'DAEMON_OPTS="-x"'
put etc/chrony/chrony.conf <<<'driftfile /var/lib/chrony/chrony.drift'
