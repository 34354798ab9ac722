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

# The initramfs does not run these files. They are installed below one directory, without the
# libraries that they need, which the real root has.
# shellcheck disable=SC2154 # dracut sets moddir, systemdsystemunitdir, initdir, systemdutildir
install() {
    local carry=/usr/lib/node-image-pivot/carry unit
    inst_multiple chmod cp ln mkdir mv sed
    inst_simple /usr/bin/node-image-pivot "$carry/bin/node-image-pivot"
    inst_simple "$systemdutildir/system-generators/node-image-pivot-generator" \
        "$carry/system-generators/node-image-pivot-generator"
    for unit in node-image-pivot.target node-image-pivotd.service node-image-pull.service \
        node-image-overlay.service node-image-finish.service; do
        inst_simple "$systemdsystemunitdir/$unit" "$carry/system/$unit"
    done
    inst_simple "$moddir/carry.sh" /usr/lib/node-image-pivot/carry.sh
    inst_simple "$moddir/node-image-pivot-carry.service" "$systemdsystemunitdir/node-image-pivot-carry.service"
    mkdir -p "$initdir$systemdsystemunitdir/initrd.target.wants"
    ln -sf ../node-image-pivot-carry.service \
        "$initdir$systemdsystemunitdir/initrd.target.wants/node-image-pivot-carry.service"
}
