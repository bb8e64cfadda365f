#!/bin/sh
# Build a base image for the Dockerfiles from Debian packages, if no image registry is reachable:
#
#     docker/base.sh localhost/python:3.11-bookworm    # then: make images BASE=localhost/python:3.11-bookworm
#
# Needs root, debootstrap and buildah. MIRROR sets another Debian mirror than the default of debootstrap.
set -eu
image=${1:?usage: docker/base.sh IMAGE}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates bookworm "$root" ${MIRROR:+"$MIRROR"}
chroot "$root" apt-get install --yes --no-install-recommends python3.11-venv
ln -s python3.11 "$root/usr/bin/python"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
rm -rf "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/info/* "$root"/usr/share/locale/*
container=$(buildah from scratch)
buildah copy --quiet "$container" "$root" / > /dev/null
buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 \
  --cmd python3.11 "$container"
buildah commit --quiet --rm "$container" "$image"
