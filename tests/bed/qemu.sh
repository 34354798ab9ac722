#!/bin/bash
# Debian 13's QEMU, unpacked: faster and steadier in software emulation than Debian 12's.
# Only extracted, never installed: the host's packages and apt sources stay as they are. OUT/qemu runs it.
set -euo pipefail
: "${OUT:?}"

mmdebstrap --mode=root --variant=extract --include=qemu-system-x86 trixie "$OUT/root"
# No emulator for graphics, no docs: only what the loader and SeaBIOS need.
rm -rf "$OUT"/root/{boot,dev,etc,proc,run,sys,var} "$OUT"/root/usr/share/{doc,man,locale,info}
cat >"$OUT/qemu" <<'RUN'
#!/bin/sh
# Its own loader and libraries: the host's C library is older than what this was built against.
here=$(cd "$(dirname "$0")" && pwd)/root
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/usr/lib64/ld-linux-x86-64.so.2" --library-path "$here/usr/lib/x86_64-linux-gnu" \
    "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
RUN
chmod +x "$OUT/qemu"
"$OUT/qemu" --version
