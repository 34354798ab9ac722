#!/bin/sh
# Checks that the given programs need no newer symbol versions than the oldest supported libraries have, and prints the
# newest ones that they need.
set -eu

status=0
for program in "$@"; do
    needed=$(objdump -p "$program" | grep -oE '\b(GLIBC|LIBOSTREE)_[A-Za-z0-9_.]+' | sort -uV)
    # Each program needs the C library. sh does not report a failed objdump.
    case $needed in
        *GLIBC_*) ;;
        *)
            echo "cannot read the symbol versions of $program" >&2
            status=1 ;;
    esac
    for floor in GLIBC_2.34 LIBOSTREE_2022.6; do
        newest=$(echo "$needed" | grep "^${floor%_*}_" | tail -n 1) || continue
        [ -n "$newest" ] || continue
        echo "$program needs $newest"
        if [ "$(printf '%s\n' "$newest" "$floor" | sort -V | tail -n 1)" != "$floor" ]; then
            echo "$program needs $newest: the oldest supported library has $floor" >&2
            status=1
        fi
    done
done
exit "$status"
