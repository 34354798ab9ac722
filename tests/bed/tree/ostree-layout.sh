#!/bin/bash
# Turns an installed Debian tree into the layout that ostree deploys: all of the system in /usr, nothing in /var.
set -euo pipefail
root=$1
cd "$root"

# dpkg's database is part of the system, not of the machine's state; a link leads to it from where dpkg looks.
mkdir -p usr/lib/sysimage
mv var/lib/dpkg usr/lib/sysimage/dpkg
rm -rf usr/lib/sysimage/dpkg/{status-old,available,lock,lock-frontend,triggers/Lock,updates,parts}
rm -rf usr/lib/sysimage/dpkg/*-old

mv etc usr/etc
rm -rf boot dev home media mnt opt proc root run srv sys tmp usr/local var vmlinuz* initrd*
mkdir boot dev proc run sys sysroot tmp var
chmod 1777 tmp
ln -s sysroot/ostree ostree
for dir in home opt srv mnt media; do ln -s "var/$dir" "$dir"; done
ln -s var/roothome root
ln -s ../var/usrlocal usr/local

cat >usr/lib/tmpfiles.d/ostree-layout.conf <<'TMPFILES'
# /var starts empty: what the links of this layout point to, and what Debian's packages expect there.
d /var/home 0755 root root -
d /var/opt 0755 root root -
d /var/srv 0755 root root -
d /var/mnt 0755 root root -
d /var/media 0755 root root -
d /var/roothome 0700 root root -
d /var/usrlocal 0755 root root -
d /var/usrlocal/bin 0755 root root -
d /var/usrlocal/sbin 0755 root root -
d /var/lib 0755 root root -
d /var/lib/misc 0755 root root -
d /var/lib/selinux 0755 root root -
L /var/lib/dpkg - - - - ../../usr/lib/sysimage/dpkg
TMPFILES
# Debian's own lines for what is a link in this layout would complain at every boot.
sed -i -E '\#^[A-Za-z+!=~^-]+[[:space:]]+/(home|srv|root)[[:space:]]#d' usr/lib/tmpfiles.d/*.conf
mkdir -p usr/lib/ostree
cat >usr/lib/ostree/prepare-root.conf <<'CONF'
[composefs]
enabled=no
[sysroot]
readonly=true
CONF
