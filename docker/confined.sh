#!/usr/bin/env bash
# Run an image like docker/compose.yaml, but with buildah instead of a container engine: as the image's user, without
# capabilities, with a read-only root, a tmpfs at /tmp, FOLDER at /work, and no network except loopback.
#
#     docker/confined.sh localhost/fadeformer-trainer FOLDER [COMMAND ...]
#
# Needs root. Passes on variables whose names start with MLFLOW, PREFECT, FADEFORMER, AWS or PG. NETWORK=host keeps the
# network, for servers that must be reachable from outside.
set -eu
[ $# -ge 2 ] || { echo "usage: docker/confined.sh IMAGE FOLDER [COMMAND ...]" >&2; exit 2; }
image=$1 work=$2
shift 2
configured() { buildah inspect --type image --format "$1" "$image"; }
# The words of entry point and command contain no spaces.
[ $# -gt 0 ] || set -- $(configured '{{range .Docker.Config.Cmd}}{{.}} {{end}}')
set -- $(configured '{{range .Docker.Config.Entrypoint}}{{.}} {{end}}') "$@"
user=$(configured '{{.Docker.Config.User}}')
environment=$(configured '{{range .Docker.Config.Env}}{{.}} {{end}}')
passed=$(env | grep -E '^(MLFLOW|PREFECT|FADEFORMER|AWS|PG)[A-Z0-9_]*=' | cut -d= -f1 | tr '\n' ' ')
container=$(buildah from "$image")
trap 'buildah umount "$container" > /dev/null; buildah rm "$container" > /dev/null' EXIT
root=$(buildah mount "$container") directory=$(configured '{{.Docker.Config.WorkingDir}}')
export root work user environment passed directory
unshare --mount --pid --fork --kill-child $([ "${NETWORK:-none}" = host ] || echo --net) bash -euc '
  [ "${NETWORK:-none}" = host ] || ip link set lo up
  mount --bind "$root" "$root"
  mount -o remount,bind,ro "$root"
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$root/tmp"
  [ ! -d "$root/work" ] || mount --bind "$work" "$root/work"
  for name in $(compgen -e); do [[ " $passed " == *" $name "* ]] || export -n "$name"; done
  for setting in $environment; do export "${setting?}"; done
  exec /usr/sbin/chroot "$root" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups \
    --no-new-privs --inh-caps=-all --bounding-set=-all env --chdir "$directory" "$@"
' bash "$@"
