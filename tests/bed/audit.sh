#!/bin/bash
# FROM (auditd, unpacked) with its unit enabled, a rule, and its directory in /var → OUT.
set -euo pipefail
: "${OUT:?}" "${FROM:?}"
umask 022
cp -a "$FROM/." "$OUT/"
# Scripts of another init system, which systemctl would ask.
rm -rf "${OUT:?}/etc/init.d" "$OUT"/etc/rc*.d
systemctl --root="$OUT" enable auditd.service
put() { install -D -m 644 /dev/stdin "$OUT/$1"; }
put etc/audit/rules.d/testbed.rules <<<'-w /etc/testbed-audited -p wa -k testbed'
put usr/lib/tmpfiles.d/testbed-audit.conf <<<'d /var/log/audit 0700 root root -'
