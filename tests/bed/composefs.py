#!/usr/bin/env python3
"""Writes the composefs image of an ostree commit: an erofs file system with all directories and metadata, in which each
file is a hole that names its object in the repo.

Usage: composefs.py REPO COMMIT IMAGE SCRATCH, with an empty SCRATCH directory on a file system with trusted attributes.
"""

import os
import subprocess
import sys

repo, commit, image, scratch = sys.argv[1:]
listing = subprocess.run(["ostree", "ls", "--repo=" + repo, "-R", "-C", commit, "/"], check=True, capture_output=True)
for line in listing.stdout.decode().splitlines():
    meta, path = line.split(" /", 1)
    mode, uid, gid, size, checksum = meta.split()[:5]
    kind, mode = mode[0], int(mode[1:], 8)
    if kind == "l":
        path, target = path.split(" -> ", 1)
    place = os.path.join(scratch, path)
    if kind == "d":
        os.makedirs(place, exist_ok=True)
    elif kind == "l":
        os.symlink(target, place)
    else:
        with open(place, "wb") as file:
            file.truncate(int(size))
        os.setxattr(place, "trusted.overlay.redirect", f"/{checksum[:2]}/{checksum[2:]}.file".encode())
        os.setxattr(place, "trusted.overlay.metacopy", b"")
    os.chown(place, int(uid), int(gid), follow_symlinks=False)
    if kind != "l":
        os.chmod(place, mode)
    os.utime(place, (0, 0), follow_symlinks=False)
# As in libostree's images: the mount point of /etc, which no commit has.
os.makedirs(os.path.join(scratch, "etc"), exist_ok=True)
subprocess.run(["mkfs.erofs", "--quiet", image, scratch], check=True)
