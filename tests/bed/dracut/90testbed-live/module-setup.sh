#!/bin/bash
# dracut module of the test bed: the live medium's root, and the files a test brings along.
# shellcheck disable=SC2154 # moddir, systemdsystemunitdir: given by dracut

check() { return 255; }   # only on request

depends() { echo systemd; }

installkernel() {
    # By name: --no-hostonly would bring every driver of the kernel package.
    instmods virtio_pci virtio_blk virtio_net isofs squashfs lz4_decompress erofs overlay ext4 xfs crc32c loop
}

install() {
    inst_multiple mount mkdir cp touch truncate losetup mkfs.ext4 chcon
    inst_script "$moddir/testbed-medium.sh" /usr/bin/testbed-medium
    inst_script "$moddir/testbed-live.sh" /usr/bin/testbed-live
    local unit
    mkdir -p "$initdir$systemdsystemunitdir/initrd-root-fs.target.requires"
    for unit in testbed-medium.service sysroot.mount testbed-live.service testbed-inject.service; do
        inst_simple "$moddir/$unit" "$systemdsystemunitdir/$unit"
        ln -s "../$unit" "$initdir$systemdsystemunitdir/initrd-root-fs.target.requires/$unit"
    done
}
