#!/bin/bash
# A release payload that names the node image in NODE (a stage of image.sh) → OUT/storage and OUT/images.jsonl.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${NODE:?}"
. "$BED/serve.sh"
umask 022
mkdir "$OUT/storage"
oci=$OUT/oci
mkdir -p "$oci/blobs/sha256" "$OUT/tree/release-manifests"
# add_blob FILE: moves the file in, prints its digest
add_blob() {
    local digest
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    mv "$1" "$oci/blobs/sha256/$digest"
    echo "sha256:$digest"
}
jq -n --arg image "registry.example.test/$(jq -r .repo "$NODE/images.jsonl")@$(jq -r .digest "$NODE/images.jsonl")" '
    {kind: "ImageStream", apiVersion: "image.openshift.io/v1", metadata: {name: "4.99.0"},
     spec: {tags: [{name: "cli", from: {kind: "DockerImage", name: "registry.example.test/cluster/cli@sha256:00"}},
                   {name: "rhel-coreos", from: {kind: "DockerImage", name: $image}}]}}' \
    >"$OUT/tree/release-manifests/image-references"
tar -C "$OUT/tree" --mtime=@0 --owner=0 --group=0 -cf "$OUT/layer.tar" release-manifests
diffid=sha256:$(sha256sum "$OUT/layer.tar" | cut -d' ' -f1)
gzip -n "$OUT/layer.tar"
size=$(stat -c %s "$OUT/layer.tar.gz")
layer=$(add_blob "$OUT/layer.tar.gz")
jq -cn --arg diffid "$diffid" '{architecture: "amd64", os: "linux", config: {}, rootfs: {type: "layers", diff_ids: [$diffid]}}' >"$OUT/config"
config_size=$(stat -c %s "$OUT/config")
config=$(add_blob "$OUT/config")
jq -cn --arg config "$config" --argjson config_size "$config_size" --arg layer "$layer" --argjson size "$size" '
    {schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
     config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size},
     layers: [{mediaType: "application/vnd.oci.image.layer.v1.tar+gzip", digest: $layer, size: $size}]}' >"$OUT/manifest"
size=$(stat -c %s "$OUT/manifest")
manifest=$(add_blob "$OUT/manifest")
jq -cn --arg digest "$manifest" --argjson size "$size" '
    {schemaVersion: 2, manifests: [{mediaType: "application/vnd.oci.image.manifest.v1+json", digest: $digest, size: $size,
     annotations: {"org.opencontainers.image.ref.name": "latest"}}]}' >"$oci/index.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$oci/oci-layout"
serve "$OUT/storage"
skopeo copy --quiet --insecure-policy --dest-tls-verify=false --digestfile "$OUT/digest" "oci:$oci:latest" "docker://$REGISTRY/cluster/release:latest"
jq -cn --arg digest "$(cat "$OUT/digest")" '{name: "release", repo: "cluster/release", tag: "latest", digest: $digest}' >"$OUT/images.jsonl"
cat "$OUT/images.jsonl"
rm -rf "$oci" "$OUT/tree" "$OUT/digest"
