#!/bin/bash
# Images that must be refused, each wrong in one way, from trees of a few files → OUT/storage and OUT/images.jsonl.
# All but the first are properly encapsulated and then damaged: the agent must get as far as the damage.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${ORACLE:?}"
. "$BED/serve.sh"
umask 022
mkdir "$OUT/storage" "$OUT/oci"
: >"$OUT/images.jsonl"

# encapsulated NAME: a small ostree commit as an image in OUT/oci/NAME. Content that no other image shares, and that
# does not compress: a damaged blob then belongs to one image only.
encapsulated() {
    local name=$1 tree=$OUT/tree repo=$OUT/repo
    mkdir -p "$tree/usr/bin" "$tree/usr/etc" "$tree/usr/lib/$name"
    printf 'ID=testbed\nPRETTY_NAME="%s"\n' "$name" >"$tree/usr/lib/os-release"
    echo "$name" >"$tree/usr/etc/name"
    printf '#!/bin/sh\necho %s\n' "$name" >"$tree/usr/bin/$name" && chmod 755 "$tree/usr/bin/$name"
    openssl enc -aes-128-ctr -nosalt -pass "pass:$name" -pbkdf2 -in /dev/zero 2>/dev/null | head -c 3000000 >"$tree/usr/lib/$name/noise" || true
    ostree init --repo="$repo" --mode=archive
    ostree commit --repo="$repo" --branch="$name" --subject="$name" --timestamp='2026-01-01 00:00:00 +0000' \
        --add-metadata-string=version=1 --owner-uid=0 --owner-gid=0 --tree=dir="$tree"
    "$ORACLE" encapsulate --single --repo "$repo" --ref "$name" --name "$name" "oci:$OUT/oci/$name:latest"
    rm -rf "$tree" "$repo"
}

blob() { printf '%s/blobs/%s' "$1" "${2/://}"; }
manifest_of() { blob "$1" "$(jq -r '.manifests[0].digest' "$1/index.json")"; }
# add_blob OCI FILE: moves the file in, prints its digest
add_blob() {
    local digest
    digest=sha256:$(sha256sum "$2" | cut -d' ' -f1)
    mv "$2" "$(blob "$1" "$digest")"
    echo "$digest"
}
# edit OCI JQ-FOR-CONFIG JQ-FOR-MANIFEST [jq arguments]: rewrites both, and the index, with right digests
edit() {
    local oci=$1 for_config=$2 for_manifest=$3 manifest config digest
    shift 3
    manifest=$(manifest_of "$oci")
    config=$(blob "$oci" "$(jq -r .config.digest "$manifest")")
    jq -c "$@" "$for_config" "$config" >"$OUT/config"
    local size; size=$(stat -c %s "$OUT/config")
    digest=$(add_blob "$oci" "$OUT/config")
    jq -c --arg config "$digest" --argjson size "$size" "$@" \
        ".config.digest = \$config | .config.size = \$size | $for_manifest" "$manifest" >"$OUT/manifest"
    size=$(stat -c %s "$OUT/manifest")
    digest=$(add_blob "$oci" "$OUT/manifest")
    jq -c --arg digest "$digest" --argjson size "$size" '.manifests[0].digest = $digest | .manifests[0].size = $size | del(.manifests[0].platform)' \
        "$oci/index.json" >"$OUT/index" && mv "$OUT/index" "$oci/index.json"
}
# with_entry OCI NAME-IN-TAR: one more file in the layer, under a name that leaves the root
with_entry() {
    local oci=$1 entry=$2 layer diffid digest size
    layer=$(blob "$oci" "$(jq -r '.layers[-1].digest' "$(manifest_of "$oci")")")
    gzip -dc "$layer" >"$OUT/layer.tar"
    echo "this must land nowhere" >"$OUT/evil"
    tar --append -P -C "$OUT" --mtime=@0 --owner=0 --group=0 --transform "s,^evil\$,$entry," -f "$OUT/layer.tar" evil
    diffid=sha256:$(sha256sum "$OUT/layer.tar" | cut -d' ' -f1)
    gzip -n "$OUT/layer.tar"
    size=$(stat -c %s "$OUT/layer.tar.gz")
    digest=$(add_blob "$oci" "$OUT/layer.tar.gz")
    edit "$oci" '.rootfs.diff_ids[-1] = $diffid | .config.Labels["ostree.final-diffid"] = $diffid' \
        '.layers[-1].digest = $digest | .layers[-1].size = $layer_size | .annotations["ostree.final-diffid"] = $diffid' \
        --arg diffid "$diffid" --arg digest "$digest" --argjson layer_size "$size"
}

encapsulated good-small
encapsulated corrupt
encapsulated truncated
encapsulated other-arch
edit "$OUT/oci/other-arch" '.architecture = "arm64" | .config.Labels.architecture = "aarch64"' '.annotations.architecture = "aarch64"'
encapsulated escape-dots
with_entry "$OUT/oci/escape-dots" ../../evil
encapsulated escape-object
with_entry "$OUT/oci/escape-object" sysroot/ostree/repo/objects/aa/../../../../../../evil.file

# Not encapsulated: an ordinary container image.
oci=$OUT/oci/plain
mkdir -p "$oci/blobs/sha256" "$OUT/tree/app"
echo "an application" >"$OUT/tree/app/readme"
tar -C "$OUT/tree" --mtime=@0 --owner=0 --group=0 -cf "$OUT/layer.tar" app
diffid=sha256:$(sha256sum "$OUT/layer.tar" | cut -d' ' -f1)
gzip -n "$OUT/layer.tar"
size=$(stat -c %s "$OUT/layer.tar.gz")
layer=$(add_blob "$oci" "$OUT/layer.tar.gz")
jq -cn --arg diffid "$diffid" '{architecture: "amd64", os: "linux", config: {Cmd: ["/bin/true"]}, rootfs: {type: "layers", diff_ids: [$diffid]}}' >"$OUT/config"
config_size=$(stat -c %s "$OUT/config")
config=$(add_blob "$oci" "$OUT/config")
jq -cn --arg config "$config" --argjson config_size "$config_size" --arg layer "$layer" --argjson size "$size" '
    {schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
     config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size},
     layers: [{mediaType: "application/vnd.oci.image.layer.v1.tar+gzip", digest: $layer, size: $size}]}' >"$OUT/manifest"
size=$(stat -c %s "$OUT/manifest")
manifest=$(add_blob "$oci" "$OUT/manifest")
jq -cn --arg digest "$manifest" --argjson size "$size" '
    {schemaVersion: 2, manifests: [{mediaType: "application/vnd.oci.image.manifest.v1+json", digest: $digest, size: $size,
     annotations: {"org.opencontainers.image.ref.name": "latest"}}]}' >"$oci/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$oci/oci-layout"

serve "$OUT/storage"
for oci in "$OUT"/oci/*; do
    name=$(basename "$oci")
    skopeo copy --quiet --insecure-policy --dest-tls-verify=false --digestfile "$OUT/digest" "oci:$oci:latest" "docker://$REGISTRY/cluster/$name:latest"
    jq -cn --arg name "$name" --arg digest "$(cat "$OUT/digest")" '{name: $name, repo: ("cluster/" + $name), tag: "latest", digest: $digest}' >>"$OUT/images.jsonl"
done

# Damage what the registry has stored, behind its back: same size with another middle, and half of it.
stored() {
    local digest
    digest=$(jq -r '.layers | max_by(.size).digest' "$(manifest_of "$OUT/oci/$1")")
    digest=${digest#sha256:}
    echo "$OUT/storage/docker/registry/v2/blobs/sha256/${digest:0:2}/$digest/data"
}
file=$(stored corrupt)
printf 'damaged damaged damaged' | dd of="$file" bs=1 seek=$(($(stat -c %s "$file") / 2)) conv=notrunc status=none
file=$(stored truncated)
truncate -s $(($(stat -c %s "$file") / 2)) "$file"

cat "$OUT/images.jsonl"
rm -rf "$OUT"/oci "$OUT"/{tree,evil,digest}
