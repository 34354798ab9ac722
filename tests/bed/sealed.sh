# A live and an installed system with a composefs root, and a node image whose root reads only files with fs-verity.
# shellcheck shell=bash

# ostree of Debian's next release: earlier ones have no composefs roots. Its libraries run on Debian 13.
next_ostree() { stage next-ostree "$(key "=$next_packages" "=$1")" download_next_ostree "$1"; }
next_packages="ostree ostree-boot libostree-1-1 libcomposefs1 libgpgme45"
download_next_ostree() {
    local apt=$OUT/apt
    mkdir -p "$apt"/{etc/apt,var/lib/apt/lists/partial,var/cache/apt/archives/partial}
    : >"$apt/status"
    # From where the tree of Debian 13 in $1 came.
    ostree cat --repo="$1/repo" node-a /usr/etc/apt/sources.list |
        sed '/security\|updates/d; s/trixie/forky/' >"$apt/etc/apt/sources.list"
    # Only extracted, never installed: the host's packages and apt sources are unchanged.
    get() {
        (cd "$OUT" && apt-get -q -o Dir="$apt" -o Dir::State::Status="$apt/status" -o Dir::Etc::TrustedParts=/usr/share/keyrings \
            -o APT::Sandbox::User=root -o Acquire::Languages=none "$@")
    }
    get update
    # shellcheck disable=SC2086 # names
    get download $next_packages
    rm -rf "$apt"
}

tree_sealed() {
    local from debs next
    from=$(tree_node_a) debs=$(debs)
    next=$(next_ostree "$from")
    stage tree-sealed "$(key "$BED/sealed-tree.sh" "=$from $debs $next")" \
        recipe sealed-tree.sh FROM="$from" DEBS="$debs" NEXT="$next"
}

# The bootimage of the two: a live medium, and an installed system's disk.
disk_sealed() {
    local base agent
    base=$(tree_sealed)
    agent=$(agent)
    stage disk-sealed "$(key "$BED/bootimage.sh" "$BED/sealed-disk.sh" "=$base" "$agent")" \
        recipe bootimage.sh BED="$BED" BASE="$base" REF=sealed-base OVERLAYS="$agent" MEDIUM=disk DISK=sealed-disk.sh
}

# Prints as JSON what the machine needs.
sealed() {
    oracle >/dev/null
    pair disk_sealed "" sealed-node "$(tree_sealed)"
}
