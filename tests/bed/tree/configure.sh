#!/bin/bash
# What every tree of the test bed is configured to, as defaults: part of /usr/etc later.
set -euo pipefail
root=$1
in_root() { chroot "$root" "$@"; }

# The build machine's name and resolver do not belong in there; nor identities that each boot makes for itself.
rm -f "$root/etc/hostname" "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_* "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
echo testbed >"$root/etc/hostname"
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
# Empty, not absent: absent means "first boot", and presets would then enable every unit there is.
: >"$root/etc/machine-id"
: >"$root/etc/fstab"
# PAM asks for it at every login.
mkdir -p "$root/etc/default" && echo 'LANG=C.UTF-8' >"$root/etc/default/locale"

# Console login as root with a password, the same in all trees. A fixed salt and day keep the file the same as well.
hash=$(openssl passwd -6 -salt testbed testbed)
sed -i -e "s|^root:[^:]*:[0-9]*:|root:$hash:20000:|" -e 's|^\([^:]*:[^:]*\):[0-9]*:|\1:20000:|' "$root/etc/shadow"
rm -f "$root"/etc/{shadow,passwd,group,gshadow,subuid,subgid}-

# One cheap host key, made at boot: RSA takes long under software emulation.
mkdir -p "$root/etc/ssh/sshd_config.d" "$root/usr/lib/systemd/system"
cat >"$root/etc/ssh/sshd_config.d/10-host-key.conf" <<<'HostKey /etc/ssh/ssh_host_ed25519_key'
cat >"$root/usr/lib/systemd/system/sshd-keygen.service" <<'UNIT'
[Unit]
Description=Make the ssh host key
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
UNIT
# Required by sshd itself, so that whatever pulls sshd in (a debugging target, say) gets the key too.
mkdir -p "$root/usr/lib/systemd/system/ssh.service.d"
printf '[Unit]\nRequires=sshd-keygen.service\nAfter=sshd-keygen.service\n' >"$root/usr/lib/systemd/system/ssh.service.d/10-host-key.conf"

cat >"$root/usr/lib/systemd/network/80-ether.network" <<'NETWORK'
[Match]
Type=ether
[Network]
DHCP=ipv4
LinkLocalAddressing=no
NETWORK

# /tmp is on a read-only root. Debian 12 has the unit only as an example.
[ -e "$root/usr/lib/systemd/system/tmp.mount" ] || cp "$root/usr/share/systemd/tmp.mount" "$root/usr/lib/systemd/system/"
mkdir -p "$root/usr/lib/systemd/system/local-fs.target.wants"
ln -sf ../tmp.mount "$root/usr/lib/systemd/system/local-fs.target.wants/tmp.mount"

in_root systemctl set-default multi-user.target
in_root systemctl enable systemd-networkd.service systemd-resolved.service ssh.service
# Jobs that a CoreOS-like system does not have, or that want a writable root.
rm -rf "$root"/etc/systemd/system/timers.target.wants "$root"/etc/systemd/system/multi-user.target.wants/e2scrub_reap.service
for unit in base-legacy.service kubelet.service node-hello.service containerd.service; do
    if [ -e "$root/usr/lib/systemd/system/$unit" ]; then in_root systemctl enable "$unit"; fi
done
