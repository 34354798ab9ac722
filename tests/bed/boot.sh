# Bootimages: the base tree with the agent on top, deployed, as a read-only filesystem to be booted live.
# shellcheck shell=bash

# A directory with the agent installed as by `make install DESTDIR=`; empty when there is none yet.
agent() {
    local out=$CACHE/agent
    case ${PIVOT_TESTBED_AGENT-} in
        none) mkdir -p "$out/none" && printf '%s\n' "$out/none" ;;
        "")
            # Always asked: cargo and make know best whether anything is to do. The stages behind it are keyed by the result.
            mkdir -p "$out/by-key"
            (
                # Tests that run side by side ask at the same time.
                flock 9
                local dir
                rm -rf --one-file-system "$out/installed.tmp"
                make -s -C "$PROJECT" install DESTDIR="$out/installed.tmp" >&2
                dir=$out/by-key/$(key "$out/installed.tmp")
                [ -d "$dir" ] || mv -T "$out/installed.tmp" "$dir"
                printf '%s\n' "$dir"
            ) 9>"$out/lock" ;;
        *) printf '%s\n' "$PIVOT_TESTBED_AGENT" ;;
    esac
}

# boot [VARIANT]: prints a directory with vmlinuz, initramfs.img, sysroot.squashfs, kargs; VARIANT "binaries" has the
# cluster's binaries in its tree and auditd, "runtime" a container runtime, "podman" that; "" has none of them.
boot() {
    local variant=${1-} base agent overlays=()
    base=$(tree_base12)
    agent=$(agent)
    overlays=("$agent")
    [ -z "$variant" ] || overlays+=("$("$variant")")
    [ "$variant" != binaries ] || overlays+=("$(audit)")
    stage "boot${variant:+-$variant}" "$(key "$BED/bootimage.sh" "$BED/composefs.py" "=$base" "${overlays[@]}")" \
        recipe bootimage.sh BED="$BED" BASE="$base" OVERLAYS="${overlays[*]}"
}

# boot_newest: the live bootimage of the newest suite.
boot_newest() {
    local base agent
    base=$(tree_newest_base)
    agent=$(agent)
    stage boot-newest "$(key "$BED/bootimage.sh" "$BED/composefs.py" "=$base" "$agent")" \
        recipe bootimage.sh BED="$BED" BASE="$base" REF=newest-base OVERLAYS="$agent"
}

# stock [VARIANT]: the live bootimage without any file of the agent, as published media are, with the modules of an old
# kernel; VARIANT as in boot.
stock() {
    local variant=${1-} base overlays
    base=$(tree_base12)
    overlays=("$(kernel)/tree")
    [ -z "$variant" ] || overlays+=("$("$variant")")
    [ "$variant" != binaries ] || overlays+=("$(audit)")
    stage "boot-stock${variant:+-$variant}" "$(key "$BED/bootimage.sh" "$BED/composefs.py" "=$base ${overlays[*]}")" \
        recipe bootimage.sh BED="$BED" BASE="$base" OVERLAYS="${overlays[*]}"
}

# initramfs MODULE DIRECTORY: an initramfs of the base system that its dracut made with MODULE, which is installed in
# DIRECTORY.
initramfs() {
    local base
    base=$(tree_base12)
    stage "initramfs-$1" "$(key "$BED/dracut.sh" "$BED/tree/initramfs.sh" "$BED/dracut" "=$base $1" "$2")" \
        recipe dracut.sh BED="$BED" BASE="$base" MODULE="$1" FROM="$2"
}

# The same with Debian's Ignition.
initramfs_ignition() { initramfs ignition "$(ignition)"; }
ignition() {
    local packages
    packages=$(unpacked ignition "$(tree_base12)" base12 ignition "")
    stage ignition "$(key "=$packages" "$BED/ignition.sh")" recipe ignition.sh FROM="$packages"
}

# disk: the same base system installed to a disk: a directory with vmlinuz, initramfs.img, disk.img, kargs.
disk() {
    local base agent
    base=$(tree_base12)
    agent=$(agent)
    stage disk "$(key "$BED/bootimage.sh" "$BED/disk.sh" "=$base" "$agent" =disk)" \
        recipe bootimage.sh BED="$BED" BASE="$base" OVERLAYS="$agent" MEDIUM=disk
}

# disk_stock: the same without any file of the agent.
disk_stock() {
    local PIVOT_TESTBED_AGENT=none
    disk
}

# The cluster's binaries on their own, for a bootimage that already has them.
binaries() { stage binaries "$(key "=$(debs)")" unpack_binaries; }
unpack_binaries() {
    local deb
    for deb in "$(debs)"/cluster-*.deb; do dpkg-deb -x "$deb" "$OUT"; done
    # Programs only: the units are not what this variant is about.
    rm -rf "${OUT:?}/etc" "${OUT:?}/usr/lib"
}

# A container runtime of the bootimage's release, as live media have one.
runtime() { unpacked runtime "$(tree_base12)" base12 runc ""; }

# podman with runc, conmon and netavark of the bootimage's release, and of node image a's: the second is for a layer upon
# that image. Not crun: it runs nothing where limits may not be raised, and a machine that runs tests may be such a place.
# Without a network backend that both releases know, the newer podman would not start on what the older one stored.
podman() { unpacked podman "$(tree_base12)" base12 "podman runc netavark" ""; }
podman_layer() { unpacked podman "$(tree_node_a)" node-a "podman runc netavark" ""; }

# Network manager with its dispatcher, message bus, authorisation and clock of CoreOS-like systems, likewise.
network() { network_for "$(tree_base12)" base12; }
network_layer() { network_for "$(tree_node_a)" node-a; }
network_for() { # DIRECTORY REF
    local packages
    packages=$(unpacked network "$1" "$2" "network-manager dbus-broker polkitd chrony" "dbus-1 polkit-1")
    stage "network-enabled-$2" "$(key "=$packages" "$BED/network.sh")" recipe network.sh FROM="$packages"
}

# The audit daemon with a rule, for the bootimage that has the binaries, and for the node image that it becomes.
audit() {
    local packages
    packages=$(unpacked audit "$(tree_base12)" base12 auditd "")
    stage audit "$(key "=$packages" "$BED/audit.sh")" recipe audit.sh FROM="$packages"
}

# unpacked NAME DIRECTORY REF PACKAGES SHARE: packages for a tree; see unpack.sh.
unpacked() {
    stage "$1-$3" "$(key "$BED/unpack.sh" "=$2 $4 $5")" \
        recipe unpack.sh REPO="$2/repo" REF="$3" PACKAGES="$4" SHARE="$5"
}
