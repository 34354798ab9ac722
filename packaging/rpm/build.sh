#!/bin/sh
# Runs rpmbuild on a Debian machine, in a copy of the source tree. NODE_IMAGE_PIVOT_BINARIES and SOURCE_DATE_EPOCH: as in
# packaging/build.sh.
#
#   build.sh OUTPUT [OPTION...]
set -eu
output=$1
shift
topdir=$(mktemp -d)
trap 'rm -rf "$topdir"' EXIT
# --nodeps: the build requirements are not installed as RPMs. bash: a script of Debian's rpm needs it, and names sh.
rpmbuild -bb --build-in-place --nodeps \
    --define "_topdir $topdir" --define "_rpmdir $output" --define '_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
    --define 'use_source_date_epoch_as_buildtime 1' --define 'clamp_mtime_to_source_date_epoch 1' \
    --define '_buildhost localhost' --define '__brp_compress bash %{_rpmconfigdir}/brp-compress %{_prefix}' \
    "$@" packaging/rpm/node-image-pivot.spec
