#!/bin/sh
# Runs in the initramfs, after the real root is mounted. Copies the agent and its configuration to /run, which the real
# root inherits. systemd also reads units and generators from there. Uses RAM of the agent's size.
#
#   carry.sh begin    before node-image-pivot-carry.service tries the agent in the real root; status 1 skips that
#   carry.sh end      afterwards, with $EXIT_STATUS of the agent
#
# For tests, the second argument is a prefix of every path. The script uses only programs that dracut always installs.
set -eu

root=${2-}
from=$root/usr/lib/node-image-pivot/carry
run=$root/run
sysroot=$root/sysroot

say() { echo "node-image-pivot: $1"; }

refuse() {
    say "$1"
    trap - EXIT
    exit 1
}

begin() {
    mkdir -p "$run"
    if [ -d "$from/settings" ]; then cp -RP "$from/settings/." "$run/"; fi
    if [ -e "$sysroot/usr/bin/node-image-pivot" ]; then
        refuse "the real root has an agent, which is used; only the configuration was carried"
    fi
    if [ ! -e "$sysroot/usr/bin/skopeo" ]; then
        refuse "the agent cannot work in the real root: /usr/bin/skopeo is missing; the boot continues without the agent"
    fi
    cp -RP "$from/agent/." "$run/"
    if [ ! -x "$run/node-image-pivot/bin/node-image-pivot" ]; then chmod 0755 "$run"/node-image-pivot/bin/*; fi
    # Last, so that a failure leaves no mount.
    mount --bind "$run" "$sysroot/run"
}

# An incomplete file may not stay: an agent would read it.
uncarried() {
    if [ $? = 0 ]; then return; fi
    rm -rf "$run/node-image-pivot" "$run/node-image-pivot.conf.d" "$run/credstore/node-image-pivot.auth"
    say "cannot copy the agent to /run; the boot continues without the agent"
}

end() {
    if [ ! -e "$run/node-image-pivot" ]; then return; fi
    umount "$sysroot/run" || :
    if [ "${EXIT_STATUS-}" != 0 ]; then
        rm -rf "$run/node-image-pivot"
        say "the agent cannot run in the real root (status ${EXIT_STATUS-unknown}); the boot continues without the agent"
        return
    fi
    cp -RP "$from/units/." "$run/"
    # A live system discards /etc and /var at its end. On an installed disk nothing may stay there.
    if [ -e "$run/ostree-live" ]; then cp -RP "$from/live/." "$run/"; fi
    # Last, a single link: the generator redirects the boot, which needs all other files.
    cp -RP "$from/generator/." "$run/"
    say "carried the agent into the real root"
}

# A failed unit would stay failed in the real root.
failed() {
    [ $? = 0 ] || say "cannot carry the agent into the real root; the boot continues without it"
    exit 0
}

case $1 in
    begin)
        trap uncarried EXIT
        begin ;;
    end)
        trap failed EXIT
        end ;;
esac
