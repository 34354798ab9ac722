#!/bin/bash
# Builds what the tests run on: QEMU, trees, bootimages, node images, the registry's storage.
#
#   build.sh TARGET...    targets: qemu oracle composefs debs trees boot registry all
#   build.sh incumbent    prints the path of ostree-ext as a program, as optimised as the agent
#   build.sh ostree-ext   the same, as the tests use it
#   build.sh skopeo       prints the directory of a newer skopeo; builds it if it is missing
#   build.sh runtime      prints the directory of a live bootimage with a container runtime; builds it if it is missing
#   build.sh podman       prints the directories of one with podman, and of a newer podman as a layer upon node image a,
#                         as JSON
#   build.sh network      the same for NetworkManager, dbus-broker, polkit and chrony
#   build.sh kernel       prints the directory of an old kernel and its modules
#   build.sh stock        prints the directory of a live bootimage without the agent
#   build.sh stock-binaries  the same with the cluster's binaries
#   build.sh initramfs    prints the directory of an initramfs that dracut made with the agent's module
#   build.sh initramfs-ignition  the same with Ignition instead
#   build.sh agent        prints the directory of the installed agent
#   build.sh disk         builds an installed system's disk, and prints where it is
#   build.sh disk-stock   the same without the agent
#   build.sh selinux      a live bootimage with an SELinux policy, a node image of the next release with its own; prints
#                         where they are, as JSON
#   build.sh selinux-disk the same bootimage installed to a disk; prints where it is
#   build.sh selinux-stock  the pair of selinux without any file of the agent
#   build.sh sealed       an installed system with a composefs root on a file system with fs-verity, and a node image; prints
#                         where they are, as JSON
#   build.sh demo         the live bootimage and node image a; prints where they are, as JSON
#   build.sh newest       the live bootimage and a node image from a suite that changes each day, likewise
#   build.sh newest-base  a live bootimage of that suite and the same node image, likewise
#   build.sh packages     prints a directory with Debian 12, its SELinux policy, rpm and dnf, for tests of packages
#   build.sh ahead        what the tests will need and needs no agent
#   build.sh paths        prints where they are, as JSON; builds what is missing
#   build.sh bench        the benchmark's encapsulated images (not part of all); prints where they are
#   build.sh bench-plain  its plain images, likewise
#
# PIVOT_TESTBED_CACHE   where (default /var/cache/node-image-pivot-testbed)
# PIVOT_TESTBED_AGENT   a directory with the installed agent (as by DESTDIR); "" builds and installs it from this
#                       checkout; "none" makes a bootimage without it
# PIVOT_BENCHMARK       the benchmark program, which makes its images itself; "" builds it
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

common_inputs=("$BED/tree.sh" "$BED/tree" "$BED/dracut" "$BED/packages")

qemu() { stage qemu "$(key "$BED/qemu.sh")" recipe qemu.sh; }

# A skopeo that enforces policy.json when it serves as the image proxy; the host's is too old for that.
skopeo_new() { stage skopeo "$(key "$BED/skopeo.sh")" recipe skopeo.sh; }

# An old kernel, and its modules for the initramfs of another one.
kernel() { stage kernel "$(key "$BED/kernel.sh")" recipe kernel.sh; }

debs() { stage debs "$(key "$BED/debs.sh" "$BED/programs")" recipe debs.sh BED="$BED"; }

# Built by cargo, which knows best what is stale; its target directory lives in the cache.
oracle_program=$CACHE/oracle/testbed/oracle
oracle() { oracle_as testbed; }
# The other side of the benchmark: the same program, as optimised as the agent.
incumbent() { oracle_as release; }
oracle_as() { # PROFILE
    local target=$CACHE/oracle
    nice -n 5 cargo build --profile "$1" --locked --quiet --manifest-path "$PROJECT/tests/oracle/Cargo.toml" \
        --target-dir "$target" >&2
    printf '%s\n' "$target/$1/oracle"
}

# composefs-rs as a program: another importer of plain images to compare with.
composefs() {
    cargo build --locked --quiet --manifest-path "$PROJECT/tests/composefs/Cargo.toml" \
        --target-dir "$CACHE/composefs" >&2
    printf '%s\n' "$CACHE/composefs/debug/composefs-unpack"
}

package_list=libostree-1-1,skopeo,systemd,systemd-sysv,dbus,rpm,dnf,createrepo-c,selinux-policy-default,policycoreutils,semodule-utils
packages() { printf '%s/root\n' "$(stage packages "$(key "=$package_list")" package_root)"; }
package_root() { mmdebstrap --mode=root --variant=minbase --format=directory --include="$package_list" bookworm "$OUT/root"; }

tree() { # NAME SUITE "LISTS" DEB...
    local name=$1 suite=$2 lists=$3 dir
    shift 3
    dir=$(debs)
    local debs=("${@/#/$dir/}")
    stage "tree-$name" "$(key "${common_inputs[@]}" "=$name $suite $lists${WEEK:+ $WEEK}" "${debs[@]}")" \
        recipe tree.sh BED="$BED" TREE="$name" SUITE="$suite" PACKAGES="$lists" DEBS="${debs[*]}"
}
tree_base12() { tree base12 bookworm "common base" base-tool_1.0.deb base-legacy_1.0.deb; }
tree_node_a() { tree node-a trixie "common node" base-tool_2.0.deb cluster-client_4.99.0.deb cluster-node_4.99.0.deb; }
tree_node_b() { tree node-b bookworm "common node" base-tool_2.0.deb cluster-client_4.99.0.deb cluster-node_4.99.0.deb; }

# The same packages from a suite that changes each day, built once a week. A mirror that is late has an expired list. Not
# every version of the SELinux policy can be installed, and ostree deploys no tree with SELinux's configuration and without a
# policy, so all of SELinux is left out. There, the kernel in /boot is a link to that of the modules, and os-release has no
# version.
tree_of_newest() ( # NAME "LISTS" DEB...
    mmdebstrap() {
        # shellcheck disable=SC2016 # for another shell
        local kernel='for k in "$1"/boot/vmlinuz-*; do rm "$k"; cp "$1/usr/lib/modules/${k##*/vmlinuz-}/vmlinuz" "$k"; done'
        command mmdebstrap --aptopt='Acquire::Check-Valid-Until "false"' --customize-hook="$kernel" \
            "${@/selinux-policy-default,policycoreutils,selinux-utils,/}"
    }
    export -f mmdebstrap
    VERSION_ID=unstable WEEK=$(date +%G-%V) tree "$1" unstable "${@:2}"
)
tree_newest() { tree_of_newest newest "common node" base-tool_2.0.deb cluster-client_4.99.0.deb cluster-node_4.99.0.deb; }
tree_newest_base() { tree_of_newest newest-base "common base" base-tool_1.0.deb base-legacy_1.0.deb; }

# shellcheck source=boot.sh
. "$BED/boot.sh"

# shellcheck source=registry.sh
. "$BED/registry.sh"

# shellcheck source=sealed.sh
. "$BED/sealed.sh"

# selinux_tree NAME TREE "FILES" "DROP" MODULE...: another tree with more and less in it, labelled, with a policy that has
# the modules.
selinux_tree() {
    local name=$1 ref=$2 files=$3 drop=$4 from
    shift 4
    from=$("tree_${ref//-/_}")
    # shellcheck disable=SC2086 # directories, without spaces
    stage "tree-$name" "$(key "$BED/selinux.sh" "=$from $name $drop" $files "$@")" \
        recipe selinux.sh FROM="$from" REF="$ref" TREE="$name" FILES="$files" DROP="$drop" MODULES="$*"
}
# A policy as a distribution ships it, with the agent's domain, and what Debian's own boot needs.
selinux_modules=("$BED/selinux/boot.cil" "$PROJECT"/packaging/selinux/*.cil)
tree_selinux_base() { selinux_tree selinux-base base12 "$BED/selinux/base" "" "${selinux_modules[@]}" "$BED/selinux/legacy.cil"; }
# The next release of everything, its policy included: another version of the format, and some two hundred types more.
tree_selinux_node() {
    # Nothing in that machine runs these; half of what it would have to pull.
    local drop="usr/lib/cni usr/bin/kubectl usr/bin/ctr usr/bin/containerd-shim* usr/bin/containerd-stress usr/sbin/runc"
    selinux_tree selinux-node node-a "$BED/selinux/base $BED/selinux/node" "$drop" "${selinux_modules[@]}" "$BED/selinux/nodeapp.cil"
}
selinux() {
    local node
    oracle >/dev/null
    base_and_node_a
    # Compiling a policy is one core's work: both at once.
    tree_selinux_node >/dev/null &
    tree_selinux_base >/dev/null
    wait $!
    node=$(tree_selinux_node)
    pair boot_selinux live selinux-node "$node"
}

# selinux_stock: the same without any file of the agent. The policies have what Fedora's has: the domain of installers.
selinux_stock() {
    local PIVOT_TESTBED_AGENT=none
    local selinux_modules=("$BED"/selinux/{boot,fedora}.cil "$PROJECT/packaging/selinux/node-image-pivot-domain.cil")
    selinux
}

# demo: what `make demo` shows: one bootimage, one node image.
demo() {
    local node
    oracle >/dev/null
    base_and_node_a
    node=$(tree_node_a)
    pair boot "" node-a "$node"
}

# newest: the live bootimage and a node image with the newest systemd. Only "make check-newest" needs it.
newest() {
    local node
    oracle >/dev/null
    node=$(tree_newest)
    pair boot "" newest "$node"
}

# newest_base: the same node image, and a live bootimage of that suite.
newest_base() {
    local node
    oracle >/dev/null
    node=$(tree_newest)
    pair boot_newest "" newest "$node"
}

# pair BOOT VARIANT NAME TREE: prints as JSON what one machine needs that becomes one node image.
pair() {
    local b i q k
    i=$(image "$3" "$4")
    b=$("$1" "$2")
    q=$(qemu)
    k=$(ssh_key)
    jq -n --arg qemu "$q/qemu" --arg key "$k" --arg boot "$b" --arg storage "$i/storage" \
        --slurpfile image "$i/images.jsonl" \
        '{qemu: $qemu, ssh_key: $key, boot: $boot, storage: $storage, image: $image[0]}'
}

# boot_selinux MEDIUM: the base system with its policy, live or installed to a disk.
boot_selinux() {
    local base agent name=boot script=()
    [ "$1" = live ] || { name=$1; script=("$BED/disk.sh"); }
    base=$(tree_selinux_base)
    agent=$(agent)
    stage "$name-selinux" "$(key "$BED/bootimage.sh" "${script[@]}" "=$base $1" "$agent")" \
        recipe bootimage.sh BED="$BED" BASE="$base" REF=selinux-base SELINUX=1 OVERLAYS="$agent" MEDIUM="$1"
}

# bench SET: encapsulated, or plain.
bench() {
    local set=$1 name=bench base more node program=${PIVOT_BENCHMARK:-}
    oracle >/dev/null
    base=$(tree_base12) more=$(tree_node_a) node=$(tree_node_b)
    if [ -z "$program" ]; then
        cargo build --release --quiet -p benchmark --manifest-path "$PROJECT/Cargo.toml" >&2
        program=${CARGO_TARGET_DIR:-$PROJECT/target}/release/benchmark
    fi
    [ "$set" = encapsulated ] || name=bench-$set
    stage "$name" "$(key "$BED/bench.sh" "$PROJECT/tests/bench/src/images" "$PROJECT/tests/oracle/src" "=$base $more $node $set")" \
        recipe bench.sh BED="$BED" SET="$set" PROGRAM="$program" ORACLE="$oracle_program" \
        BASE="$base/repo=base12" MORE="$more/repo=node-a" NODE="$node/repo=node-b"
}

# The key that guests accept: made here, never shipped.
ssh_key() {
    [ -f "$CACHE/ssh/key" ] || { mkdir -p "$CACHE/ssh" && ssh-keygen -q -t ed25519 -N "" -C testbed -f "$CACHE/ssh/key"; }
    printf '%s\n' "$CACHE/ssh/key"
}

# Two trees at a time: half of the work is waiting for dpkg.
base_and_node_a() {
    debs >/dev/null
    tree_base12 >/dev/null &
    local base=$!
    tree_node_a >/dev/null
    wait "$base"
}
trees() {
    base_and_node_a
    tree_node_b >/dev/null
}

[ $# -gt 0 ] || set -- all
for target in "$@"; do
    case $target in
        qemu | oracle | composefs | debs | trees | boot | registry | tree_*) "$target" >&2 ;;
        # These print the paths of images that only some tests use. "all" does not contain the images of the benchmark.
        skopeo) skopeo_new ;;
        incumbent) incumbent ;;
        ostree-ext) oracle ;;
        kernel) kernel ;;
        packages) packages ;;
        bench) bench encapsulated ;;
        bench-plain) bench plain ;;
        stock | agent | disk) "$target" ;;
        stock-binaries) stock binaries ;;
        initramfs)
            a=$(agent)
            initramfs node-image-pivot "$a" ;;
        initramfs-ignition) initramfs_ignition ;;
        disk-stock) disk_stock ;;
        selinux-disk) boot_selinux disk ;;
        runtime) boot runtime ;;
        podman | network)
            b=$(boot "$target")
            l=$("${target}_layer")
            jq -n --arg boot "$b" --arg layer "$l" '{boot: $boot, layer: $layer}' ;;
        selinux | demo | newest | sealed) "$target" ;;
        selinux-stock) selinux_stock ;;
        newest-base) newest_base ;;
        all) trees; boot >&2; registry >&2; qemu >&2; skopeo_new >&2 ;;
        ahead)
            trees
            for step in registry qemu skopeo_new kernel stock disk_stock initramfs_ignition runtime podman podman_layer network network_layer tree_selinux_base tree_selinux_node selinux_stock composefs packages; do
                "$step" >&2
            done ;;
        paths)
            # Assignments, not arguments: a failing stage has to end this.
            trees
            # One each: of several in a line only the last one's failure counts.
            q=$(qemu)
            b=$(boot)
            bb=$(boot binaries)
            r=$(registry)
            k=$(ssh_key)
            jq -n --arg q "$q/qemu" --arg b "$b" --arg bb "$bb" --arg r "$r" --arg k "$k" \
                '{qemu: $q, boot: $b, boot_binaries: $bb, registry: $r, ssh_key: $k}' ;;
        *) die "unknown target: $target" ;;
    esac
done
