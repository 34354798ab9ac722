#!/bin/bash
# The steps of the installer's scripts that this agent replaces, for `make bench-boot`. A unit runs each part in the guest:
#   incumbent.sh pull IMAGE    the booted repo and the image into RAM, a checkout, the list of the local changes in /etc
#   incumbent.sh overlay       the checkout over /usr, and its /etc over the machine's
# /run/incumbent-steps gets the start of each step, in seconds since the epoch.
set -euo pipefail
place=/var/ostreecontainer
step() { printf '%s %s\n' "$EPOCHREALTIME" "$*" >>/run/incumbent-steps; }

pull() {
    local commit
    step "copy the booted repo"
    mkdir -p "$place"
    mount -t tmpfs -o size=5G incumbent "$place"
    ostree init --mode=bare --repo="$place/repo"
    ostree pull-local --repo="$place/repo" /ostree/repo
    step "import"
    until commit=$(/var/incumbent/oracle import --repo "$place/repo" "ostree-unverified-registry:$1"); do sleep 10; done
    step "check out"
    ostree refs --repo="$place/repo" --create=coreos/node-image "$commit"
    ostree checkout -H --repo="$place/repo" coreos/node-image "$place/checkout"
    step "compare /etc"
    # Letter and path of each local change. A container has no booted deployment that ostree knows.
    { ostree admin config-diff || true; } | sed -n 's|^[ADM]  *|./|p' >/run/incumbent-changes
    step "delete the repo"
    rm -rf "$place/repo"
    step "wait for the overlay"
}

overlay() {
    step "mount /usr"
    mount --bind /usr/lib/modules "$place/checkout/usr/lib/modules"
    mount --rbind "$place/checkout/usr" /usr
    mount -o remount,bind,ro /usr
    step "copy /etc"
    tar -C "$place/checkout/usr/etc" -c --exclude=./crypto-policies --exclude-from=/run/incumbent-changes . | tar -C /etc -x
    systemctl --no-block try-restart ssh.service
    step "isolate"
}

case $1 in
    pull) pull "$2" ;;
    overlay) overlay ;;
esac
