#!/bin/sh
# What a live medium adds after ostree-prepare-root: tmpfs /var, writable /etc, the marker others look for.
set -e
mount -t tmpfs -o mode=0755,size=50%,nr_inodes=1m tmpfs /sysroot/var
mkdir -p /run/ephemeral
mount -t tmpfs -o mode=0755 tmpfs /run/ephemeral
mkdir -p /run/ephemeral/etc /run/ephemeral/etc.work
mount -t overlay -o lowerdir=/sysroot/etc,upperdir=/run/ephemeral/etc,workdir=/run/ephemeral/etc.work overlay /sysroot/etc
touch /run/ostree-live
