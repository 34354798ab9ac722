#!/bin/bash
# Copies the source tree of a checkout, without what was built or fetched in it. Only a link to its crates is made.
#
#   copy.sh OUTPUT
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
tar --create --directory "$project" --exclude=target --exclude=./.git --exclude=./.cache --exclude=./vendor \
    --exclude=./fuzz/corpus --exclude=./fuzz/artifacts . | tar --extract --no-same-owner --directory "$1"
[ ! -d "$project/vendor" ] || ln -s "$project/vendor" "$1"
