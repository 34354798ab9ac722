#!/bin/bash
# The part of test.sh inside the container, as its root.
set -euo pipefail
cd /packages
admin=/etc/node-image-pivot.conf.d/50-image.toml
agent=/usr/bin/node-image-pivot
install -D -m 0644 /dev/stdin "$admin" <<<'image = "registry.example.com/node:1"'

die() { echo "error: $*" >&2; exit 1; }
# snapshot: files that a package may touch, without the databases of the package managers and the policy store, and
# directories of ours. The others belong to packages of the Fedora family.
snapshot() {
    find /usr /etc \( -path /etc/selinux -o -path /etc/.updated \) -prune -o \
        \( ! -type d -o -name '*node-image-pivot*' \) -printf '%p %y %m %u %l\n' | sort
}
# unchanged WHEN BEFORE: the tree is that of the snapshot.
unchanged() { diff <(echo "$2") <(snapshot) || die "$1 leaves the lines above"; }
# usable: the agent runs, and nothing was enabled.
usable() {
    "$agent" --version | grep -q '^node-image-pivot ' || die "the agent does not run"
    "$agent" status --exit-code >/dev/null || true
    [ -z "$(find /etc/systemd/system -name 'node-image-*')" ] || die "a unit is enabled"
    grep -q registry.example.com "$admin" || die "the administrator's configuration is lost"
}

before=$(snapshot)
dpkg -i node-image-pivot_*.deb
usable
dpkg --verify node-image-pivot
dpkg -i next.deb
usable
[[ $(dpkg-query -W -f '${Version}' node-image-pivot) = *+next ]] || die "dpkg does not show the next version"
dpkg --remove node-image-pivot
unchanged "removing the Debian package" "$before"
dpkg --purge node-image-pivot
unchanged "purging the Debian package" "$before"
echo "dpkg: installed, upgraded, removed"

# A policy store under the name that the Fedora family uses. Debian's policy lacks the domain that the module names.
cp -a /etc/selinux/default /etc/selinux/targeted
cp -a /var/lib/selinux/default /var/lib/selinux/targeted
semodule --noreload --store=targeted --install=domain.cil
module() { semodule --store=targeted --list-modules=full | awk '$2 == "node-image-pivot" { print $1, $2, $3 }'; }
label() { grep -c '^/usr/bin/node-image-pivot.*:install_exec_t:' /etc/selinux/targeted/contexts/files/file_contexts || true; }

# stub NAME VERSION [PROVIDES]: an empty RPM in place of one of the Fedora family.
repository=/packages/repository
stub() {
    printf '%s\n' "Name: $1" "Version: $2" 'Release: 1' "Summary: Stands for $1" 'License: MIT' 'BuildArch: noarch' "${3-}" \
        '%description' "Stands for $1." '%files' >stub.spec
    rpmbuild -bb --quiet --define "_rpmdir $repository" stub.spec
    createrepo_c --quiet "$repository"
}
dnf() {
    command dnf --quiet --assumeyes --nogpgcheck --releasever=1 --setopt=reposdir=/nonexistent --refresh \
        --repofrompath="stubs,file://$repository" "$@"
}
# The libraries that packages of the Fedora family provide. dnf does not install an agent that needs more.
libraries='ld[-a-z0-9]*\.so\.[12]|lib[cm]\.so\.6|libgcc_s\.so\.1|libostree-1\.so\.1|lib(gio|glib|gobject)-2\.0\.so\.0'
libraries="($libraries)\([A-Z0-9_.]*\)\(64bit\)|rtld\(GNU_HASH\)|/bin/sh|(/usr)?/bin/bash"
stub libraries 1 "$(rpm --query --package --requires node-image-pivot-*-1.*.rpm | grep -xE "$libraries" | sed 's/^/Provides: /')"
stub skopeo 1
stub systemd 251

before=$(snapshot)
! dnf install ./node-image-pivot-*-1.*.rpm 2>dnf.log || die "dnf installs the agent with systemd 251"
grep -q 'systemd >= 252' dnf.log || die "dnf does not name the missing systemd: $(<dnf.log)"
stub systemd 252
dnf install ./node-image-pivot-*-1.*.rpm
rpm --query libraries skopeo systemd >/dev/null || die "dnf does not install what the agent needs"
usable
rpm --verify node-image-pivot
[ "$(module)" = "200 node-image-pivot pp" ] || die "after the installation the policy modules have: $(module)"
[ "$(label)" = 1 ] || die "the installed policy does not label the agent"
# As version 0.1.0 installed it.
semodule --noreload --store=targeted --install=/usr/share/selinux/packages/node-image-pivot.cil
dnf upgrade ./node-image-pivot-*-2.*.rpm
usable
[ "$(rpm -q --queryformat '%{RELEASE}' node-image-pivot)" = 2 ] || die "rpm does not show the next release"
[ "$(module)" = "200 node-image-pivot pp" ] || die "after the upgrade the policy modules have: $(module)"
dnf remove node-image-pivot
unchanged "removing the RPM" "$before"
[ "$(module)$(label)" = 0 ] || die "removing the RPM leaves its policy module"
echo "dnf: installed with its dependencies, upgraded, removed; the policy module with it"
