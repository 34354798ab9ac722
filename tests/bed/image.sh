#!/bin/bash
# REPO's ref NAME as a chunked container image → OUT/storage (a registry's) and OUT/images.jsonl.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${NAME:?}" "${REPO:?}" "${ORACLE:?}"
. "$BED/serve.sh"

"$ORACLE" encapsulate --repo "$REPO" --ref "$NAME" --name "$NAME" "oci:$OUT/oci:latest"
mkdir "$OUT/storage"
serve "$OUT/storage"
skopeo copy --quiet --insecure-policy --dest-tls-verify=false --digestfile "$OUT/digest" \
    "oci:$OUT/oci:latest" "docker://$REGISTRY/cluster/$NAME:latest"
jq -cn --arg name "$NAME" --arg digest "$(cat "$OUT/digest")" --arg commit "$(ostree rev-parse --repo="$REPO" "$NAME")" \
    '{name: $name, repo: ("cluster/" + $name), tag: "latest", digest: $digest, commit: $commit}' >"$OUT/images.jsonl"
cat "$OUT/images.jsonl"
rm -rf "$OUT/oci"
