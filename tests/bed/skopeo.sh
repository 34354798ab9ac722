#!/bin/bash
# Debian 13's skopeo, unpacked: the first Debian whose image proxy enforces policy.json (skopeo 1.13 and later do).
# Only extracted, never installed: the host's packages and apt sources stay as they are. OUT/skopeo runs it; what it
# reads below /etc/containers, and the gpg that gpgme starts, are the host's.
set -euo pipefail
: "${OUT:?}"

mmdebstrap --mode=root --variant=extract --include=skopeo trixie "$OUT/root"
lib=usr/lib/x86_64-linux-gnu
# Only the program, its loader and the libraries that it names.
mkdir -p "$OUT/kept/bin" "$OUT/kept/lib"
cp "$OUT/root/usr/bin/skopeo" "$OUT/kept/bin/"
# A library that it may load later (name service) is the host C library's business only if it is missing here.
cp -L "$OUT/root/$lib/ld-linux-x86-64.so.2" "$OUT/kept/lib/"
"$OUT/root/$lib/ld-linux-x86-64.so.2" --library-path "$OUT/root/$lib" --list "$OUT/root/usr/bin/skopeo" |
    sed -n 's/.* => \(.*\) (0x.*/\1/p' | while read -r library; do cp -L "$library" "$OUT/kept/lib/"; done
for library in libnss_files.so.2 libnss_dns.so.2; do
    [ ! -e "$OUT/root/$lib/$library" ] || cp -L "$OUT/root/$lib/$library" "$OUT/kept/lib/"
done
rm -rf "$OUT/root"
cat >"$OUT/skopeo" <<'RUN'
#!/bin/sh
# Its own loader and libraries: the host's C library is older than what this was built against.
here=$(cd "$(dirname "$0")" && pwd)/kept
exec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" "$here/bin/skopeo" "$@"
RUN
chmod +x "$OUT/skopeo"
"$OUT/skopeo" --version
