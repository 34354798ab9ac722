#!/bin/sh
# Runs in the initramfs. Copies the agent to /run, which the real root inherits. systemd also reads units
# and generators from there. Uses RAM of the agent's size.
# For tests, the first argument is a prefix of every path.
set -eu

root=${1-}
from=$root/usr/lib/node-image-pivot/carry
bin=/run/node-image-pivot/bin

mkdir -p "$root$bin" "$root/run/systemd/system" "$root/run/systemd/system-generators"
cp "$from/bin/node-image-pivot" "$root$bin/node-image-pivot"
chmod 0755 "$root$bin/node-image-pivot"
# The real root's SELinux policy has no label for the program below /run, and the label selects its domain.
label="ExecStartPre=-/bin/sh -c '[ ! -e /sys/fs/selinux/enforce ] || chcon -t install_exec_t $bin/node-image-pivot'"
for unit in "$from"/system/*; do
    # The unit files name the path of an installed agent.
    sed -e "s#^ExecStart=/usr/bin/node-image-pivot daemon#$label\\nExecStart=$bin/node-image-pivot daemon#" \
        -e "s|^ExecStart=/usr/bin/|ExecStart=$bin/|" "$unit" > "$root/run/systemd/system/${unit##*/}"
done
ln -sfn node-image-pivot.target "$root/run/systemd/system/node-image-overlay.target"

# Last and atomically: the generator redirects the boot, which needs all other files.
generators=$root/run/systemd/system-generators
cp "$from/system-generators/node-image-pivot-generator" "$generators/.node-image-pivot-generator.new"
chmod 0755 "$generators/.node-image-pivot-generator.new"
mv "$generators/.node-image-pivot-generator.new" "$generators/node-image-pivot-generator"
