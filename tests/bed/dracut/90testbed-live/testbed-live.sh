#!/bin/sh
# What a live medium adds after ostree-prepare-root: tmpfs /var, a writable /etc on a file system in RAM, the marker others
# look for.
set -e
mount -t tmpfs -o mode=0755,size=50%,nr_inodes=1m tmpfs /sysroot/var
truncate --size=512M /run/ephemeral.img
mkfs.ext4 -q -O ^has_journal /run/ephemeral.img
mkdir /run/ephemeral
mount -o loop /run/ephemeral.img /run/ephemeral
mkdir /run/ephemeral/etc /run/ephemeral/etc.work
# Where the deployment has labels.
chcon --reference=/sysroot/etc /run/ephemeral/etc 2>/dev/null || true
mount -t overlay -o lowerdir=/sysroot/etc,upperdir=/run/ephemeral/etc,workdir=/run/ephemeral/etc.work overlay /sysroot/etc
touch /run/ostree-live
