# Node images and bad images, and the storage of a registry that serves them all.
# shellcheck shell=bash

# image NAME TREE [KIND REF]: the tree as a container image, in a separate storage. KIND: encapsulate, or plain.
image() {
    local name=$1 tree=$2 kind=${3:-encapsulate} ref=${4:-$1}
    stage "image-$name" \
        "$(key "$BED/image.sh" "$BED/serve.sh" "$PROJECT/tests/oracle/src" "$PROJECT/tests/oracle/Cargo.lock" "=$tree $kind")" \
        recipe image.sh BED="$BED" NAME="$name" REPO="$tree/repo" REF="$ref" KIND="$kind" ORACLE="$oracle_program"
}
# Node image b without an encapsulated commit.
node_b_plain() { image node-b-plain "$(tree_node_b)" plain node-b; }
bad_images() {
    stage image-bad "$(key "$BED/bad-images.sh" "$BED/serve.sh")" \
        recipe bad-images.sh BED="$BED" ORACLE="$oracle_program"
}

# The base system itself, but for a program that needs a newer CPU, and auditd: a machine that runs the base system stores
# little.
newer_cpu() {
    local base audit
    base=$(tree_base12)
    audit=$(audit)
    stage tree-newer-cpu "$(key "$BED/newer-cpu.sh" "=$base $audit")" \
        recipe newer-cpu.sh FROM="$base" AUDIT="$audit" NAME=newer-cpu
}
# The bootimage's own tree with little more.
node_small() {
    local base binaries
    base=$(tree_base12)
    binaries=$(binaries)
    stage tree-node-small "$(key "$BED/node-small.sh" "=$base $binaries")" \
        recipe node-small.sh BASE="$base" BINARIES="$binaries"
}
# A payload that names node image a.
release() {
    local node
    node=$(image node-a "$(tree_node_a)")
    stage image-release "$(key "$BED/release.sh" "$BED/serve.sh" "=$node")" recipe release.sh BED="$BED" NODE="$node"
}

# registry: prints a directory with storage/ (for docker-registry's filesystem driver) and images.json.
registry() {
    oracle >/dev/null
    local parts a b plain bad newer small release
    # Compressing is one core's work per image: all at once.
    image node-a "$(tree_node_a)" >/dev/null &
    a=$!
    image node-b "$(tree_node_b)" >/dev/null &
    b=$!
    node_b_plain >/dev/null &
    plain=$!
    wait "$a" && wait "$b" && wait "$plain"
    a=$(image node-a "$(tree_node_a)")
    b=$(image node-b "$(tree_node_b)")
    plain=$(node_b_plain)
    bad=$(bad_images)
    newer=$(image newer-cpu "$(newer_cpu)")
    small=$(image node-small "$(node_small)")
    release=$(release)
    parts=("$a" "$b" "$plain" "$bad" "$newer" "$small" "$release")
    stage registry "$(key "${parts[@]/#/=}" =1)" merge_storages "${parts[@]}"
}
# Storages are addressed by content below and by name above: hardlinking them into one directory merges them.
merge_storages() {
    local part
    for part in "$@"; do cp -al "$part/storage" "$OUT/"; done
    cat "${@/%//images.jsonl}" | jq -s 'map({key: .name, value: .}) | from_entries' >"$OUT/images.json"
    cat "$OUT/images.json"
}
