#!/bin/sh
# Fuzzes every target for FUZZ_SECONDS (default 60) each, from seeds made by code and whatever earlier
# runs found. Fails when one finds something; what it found is under fuzz/artifacts/TARGET.
#
# cargo-fuzz wants a nightly compiler for its sanitizers only; the code is safe Rust, so the stable one
# with coverage counters, overflow checks and debug assertions does, told that it may.
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60}
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
FUZZ_CORPUS="$PWD/fuzz/corpus" cargo test --release --quiet --lib import::fuzzing::tests::seeds_are_accepted
export RUSTC_BOOTSTRAP=1
for target in ${FUZZ_TARGETS:-tar encapsulated plain references}; do
  echo "fuzz: $target for $seconds s"
  cargo fuzz run --sanitizer none "$target" -- \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=512 -max_len=65536 -print_final_stats=1
done
echo "fuzz: nothing found in $seconds s each"
