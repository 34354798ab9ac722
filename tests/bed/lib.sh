# Shared by the scripts of the test bed: the cache, stages keyed by their inputs, timing.
# shellcheck shell=bash
set -euo pipefail
# A failing $(command) ends the script also inside functions called by $(…).
shopt -s inherit_errexit
umask 022

BED=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # for those who source this
PROJECT=$(cd "$BED/../.." && pwd)
CACHE=${PIVOT_TESTBED_CACHE:-/var/cache/node-image-pivot-testbed}
mkdir -p "$CACHE"

say() { printf 'testbed: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# key INPUT...: a short hash over files, directories (content, mode, link targets) and literal strings ("=text").
# A stage whose key has not changed is not built again; file times do not count, so a fresh clone hits the cache.
key() {
    local input
    for input in "$@"; do
        case $input in
            =*) printf '%s\n' "$input" ;;
            *)
                [ -e "$input" ] || die "no such input: $input"
                # NUL-separated throughout: names are data. The path itself stays out, so clones share the cache.
                (
                    cd "$(dirname "$input")"
                    find "$(basename "$input")" \( -type f -o -type l \) -printf '%p %m %l\n' | LC_ALL=C sort
                    find "$(basename "$input")" -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum
                ) ;;
        esac
    done | sha256sum | cut -c1-16
}

# stage NAME KEY COMMAND...: run COMMAND with OUT=directory unless $CACHE/NAME/KEY is there; prints that directory.
# The directory appears by rename when COMMAND is through: a killed build leaves nothing that looks finished.
stage() {
    local name=$1 key=$2 dir tmp wall user system TIMEFORMAT='%1R %1U %1S'
    shift 2
    dir=$CACHE/$name/$key
    mkdir -p "$CACHE/$name"
    (
        # Two checkouts of the project may share the cache; the second one waits and finds the stage built.
        flock 9
        if [ ! -d "$dir" ]; then
            tmp=$CACHE/$name/tmp
            rm -rf --one-file-system "$tmp"
            mkdir "$tmp"
            say "$name: building (log: $CACHE/$name/log)"
            if ! { time OUT=$tmp "$@" >"$CACHE/$name/log" 2>&1; } 2>"$CACHE/$name/time"; then
                tail -n 30 "$CACHE/$name/log" >&2
                die "$name failed; see $CACHE/$name/log"
            fi
            mv "$tmp" "$dir"
            read -r wall user system <"$CACHE/$name/time"
            say "$name: done in $wall s, CPU $(echo "$user $system" | awk '{print $1 + $2}') s, $(du -sm "$dir" | cut -f1) MiB"
            # What no checkout has used for long is only weight: keep the three newest.
            find "$CACHE/$name" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %p\n' | sort -rn | tail -n +4 | cut -d' ' -f2- |
                while read -r old; do rm -rf --one-file-system "$old"; done
        fi
        touch "$dir"
    ) 9>"$CACHE/$name/lock"
    printf '%s\n' "$dir"
}

# Run a recipe script as a stage's command, with the environment that the recipe wants given as VAR=value words.
recipe() { nice -n 5 env "${@:2}" bash "$BED/$1"; }
