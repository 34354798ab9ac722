#!/bin/bash
# dracut module that carries the agent in an initramfs, for bootimages that do not contain it.
# It is added only on request (`dracut --add node-image-pivot`). See README.md in the source tree.

check() {
    # 255: only if requested, or required by another module.
    return 255
}

depends() {
    echo systemd
}

# Adds the files of `node-image-pivot pack initrd`, and the programs that carry.sh uses.
# shellcheck disable=SC2154 # dracut sets initdir, and dracutsysrootdir for an installation in another directory
install() {
    inst_multiple chmod cp mkdir mount rm umount
    node-image-pivot pack initrd --directory "$initdir" ${dracutsysrootdir:+--root "$dracutsysrootdir"}
    # dracut adds the libraries of executable files. The agent uses those of the real root; carry.sh restores the mode.
    chmod a-x "$initdir"/usr/lib/node-image-pivot/carry/agent/node-image-pivot/bin/*
}
