#!/bin/bash
# A SET of the benchmark's images: PROGRAM (tests/bench) makes them of three trees' repos BASE, MORE, NODE → OUT/images.
set -euo pipefail
: "${OUT:?}" "${SET:?}" "${PROGRAM:?}" "${ORACLE:?}" "${BASE:?}" "${MORE:?}" "${NODE:?}"

# They take gigabytes: what an older key had built goes first.
find "$(dirname "$OUT")" -mindepth 1 -maxdepth 1 -type d ! -path "$OUT" -exec rm -rf --one-file-system {} +
"$PROGRAM" images --base "$BASE" --more "$MORE" --node "$NODE" --oracle "$ORACLE" --set "$SET" "$OUT/images"
