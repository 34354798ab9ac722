#!/bin/sh
# Fuzzes each target for FUZZ_SECONDS (default 60), starting from generated seeds and the corpus of
# earlier runs. Fails if a target fails: the input is then in fuzz/artifacts/TARGET.
#
# cargo-fuzz needs a nightly compiler only for sanitizers. The code is safe Rust, so the stable compiler
# with coverage counters, overflow checks and debug assertions is enough. RUSTC_BOOTSTRAP permits it.
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60}
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
FUZZ_CORPUS="$PWD/fuzz/corpus" cargo test --release --quiet -p node-store --lib import::fuzzing::tests::seeds_are_accepted
export RUSTC_BOOTSTRAP=1
for target in ${FUZZ_TARGETS:-tar encapsulated plain references}; do
  echo "fuzz: $target for $seconds s"
  cargo fuzz run --sanitizer none "$target" -- \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=512 -max_len=65536 -print_final_stats=1
done
echo "fuzz: no failures in $seconds s for each target"
