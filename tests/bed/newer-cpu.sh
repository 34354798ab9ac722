#!/bin/bash
# The commit base12 in FROM/repo, but for /usr/bin/true, which needs the CPU level x86-64-v3, and with the files in AUDIT
# → ref NAME in OUT/repo.
# A separate commit, not a plain layer on top: the tree has a policy and no labels, so an import of plain layers would
# write all of it again.
set -euo pipefail
: "${OUT:?}" "${FROM:?}" "${AUDIT:?}" "${NAME:?}"
umask 022
mkdir -p "$OUT/tree/usr/bin" "$OUT/tree/usr/etc"
cp -a "$AUDIT/usr" "$OUT/tree/"
cp -a "$AUDIT/etc/." "$OUT/tree/usr/etc/"
echo 'int main(void) { return 0; }' | gcc -O1 -Wl,-z,x86-64-v3 -x c - -o "$OUT/tree/usr/bin/true"
readelf -n "$OUT/tree/usr/bin/true" | grep -q 'ISA needed:.*x86-64-v3'
ostree init --repo="$OUT/repo" --mode=bare
ostree pull-local --disable-fsync --repo="$OUT/repo" "$FROM/repo" base12
ostree commit --repo="$OUT/repo" --fsync=no --branch="$NAME" --subject="$NAME" --timestamp='2026-01-01 00:00:00 +0000' \
    --bootable --add-metadata-string=version=12 --no-xattrs \
    --tree=ref=base12 --tree=dir="$OUT/tree"
rm -rf "$OUT/tree"
