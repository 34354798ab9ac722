#!/bin/bash
# Creates the system users of packages/ids before the packages that would number them as they like.
set -euo pipefail
root=$1
while read -r kind name id; do
    case $kind in
        group) echo "$name:x:$id:" >>"$root/etc/group" ;;
        user)
            echo "$name:x:$id:" >>"$root/etc/group"
            echo "$name:x:$id:$id:$name:/:/usr/sbin/nologin" >>"$root/etc/passwd" ;;
    esac
done < <(grep -v '^#' "$BED/packages/ids")
