#!/bin/bash
# REPO's ref REF as the container image NAME → OUT/storage (a registry's) and OUT/images.jsonl. KIND: encapsulate for a
# chunked image, plain for one without an encapsulated commit, whose commit only its importer knows.
set -euo pipefail
: "${OUT:?}" "${BED:?}" "${NAME:?}" "${REPO:?}" "${REF:?}" "${KIND:?}" "${ORACLE:?}"
. "$BED/serve.sh"

case $KIND in
    encapsulate)
        "$ORACLE" encapsulate --repo "$REPO" --ref "$REF" --name "$NAME" "oci:$OUT/oci:latest"
        commit=$(ostree rev-parse --repo="$REPO" "$REF") ;;
    plain)
        "$ORACLE" plain --repo "$REPO" --ref "$REF" --name "$NAME" "$OUT/oci"
        commit= ;;
esac
mkdir "$OUT/storage"
serve "$OUT/storage"
skopeo copy --quiet --insecure-policy --dest-tls-verify=false --digestfile "$OUT/digest" \
    "oci:$OUT/oci:latest" "docker://$REGISTRY/cluster/$NAME:latest"
jq -cn --arg name "$NAME" --arg digest "$(cat "$OUT/digest")" --arg commit "$commit" \
    '{name: $name, repo: ("cluster/" + $name), tag: "latest", digest: $digest,
      commit: (if $commit == "" then null else $commit end)}' >"$OUT/images.jsonl"
cat "$OUT/images.jsonl"
rm -rf "$OUT/oci"
