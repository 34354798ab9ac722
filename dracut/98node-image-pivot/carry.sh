#!/bin/sh
# Runs in the initramfs. Puts the agent under /run, which the real root inherits: systemd reads units
# and generators from there, too. Uses 1x the agent's size of RAM.
# For tests, the first argument is put in front of every path.
set -eu

root=${1-}
from=$root/usr/lib/node-image-pivot/carry
bin=/run/node-image-pivot/bin

mkdir -p "$root$bin" "$root/run/systemd/system" "$root/run/systemd/system-generators"
cp "$from/bin/node-image-pivot" "$root$bin/node-image-pivot"
chmod 0755 "$root$bin/node-image-pivot"
# systemd labels /run by its policy, which knows nothing of this program; the label is what decides its domain.
label="ExecStartPre=-/bin/sh -c '[ ! -e /sys/fs/selinux/enforce ] || chcon -t install_exec_t $bin/node-image-pivot'"
for unit in "$from"/system/*; do
    # The unit files say where a package puts the agent.
    sed -e "s#^ExecStart=/usr/bin/node-image-pivot daemon#$label\\nExecStart=$bin/node-image-pivot daemon#" \
        -e "s|^ExecStart=/usr/bin/|ExecStart=$bin/|" "$unit" > "$root/run/systemd/system/${unit##*/}"
done
ln -sfn node-image-pivot.target "$root/run/systemd/system/node-image-overlay.target"

# Last and in one step: the generator redirects the boot, so all that it leads to has to be there.
generators=$root/run/systemd/system-generators
cp "$from/system-generators/node-image-pivot-generator" "$generators/.node-image-pivot-generator.new"
chmod 0755 "$generators/.node-image-pivot-generator.new"
mv "$generators/.node-image-pivot-generator.new" "$generators/node-image-pivot-generator"
