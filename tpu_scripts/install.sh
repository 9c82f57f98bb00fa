#!/usr/bin/env bash
# On a worker, in the unpacked tree: Python 3.11, this package with jax for TPU, data, disk. Called
# by setup.sh; a second call is harmless. Touches no TPU: a process there would keep training out.
#
# DATA_URL: bucket's folder of data sets that go to DATA_DIR. DATA_DISK: mounts the attached disk
# with the label `speciarl` at DATA_MOUNT, read-only. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${APT_TRIES:=60}" "${APT_WAIT_S:=10}" "${DATA_MOUNT:=/mnt/disks/data}"
: "${DATA_DIR:=$HOME/.cache/speciarl/data}"

# Ubuntu's own updates hold apt's locks for minutes after the first boot. apt waits for one of them
# by itself (DPkg::Lock::Timeout), for that of the package lists it does not.
apt_get() {
  local try
  for ((try = 1; try <= APT_TRIES; try++)); do
    run sudo apt-get -o DPkg::Lock::Timeout=600 "$@" && return
    echo "install.sh: apt-get $1 failed, try $try of $APT_TRIES" >&2
    sleep "$APT_WAIT_S"
  done
  fail "apt-get $1 failed $APT_TRIES times; its last message is above"
}

# The base images carry Python 3.10; the deadsnakes packages bring 3.11 beside it.
if ! command -v python3.11 >/dev/null; then
  run sudo add-apt-repository --yes --no-update ppa:deadsnakes/ppa
  apt_get update
  apt_get install --yes python3.11-venv
fi
run python3.11 -m venv .venv
run .venv/bin/python -m pip install --quiet -e '.[tpu,gcp]'

if [[ -n "${DATA_URL:-}" ]]; then
  run mkdir -p "$DATA_DIR"
  run gcloud storage rsync --recursive "$DATA_URL" "$DATA_DIR"
fi
if [[ -n "${DATA_DISK:-}" ]] && ! mountpoint --quiet "$DATA_MOUNT"; then
  run sudo mkdir -p "$DATA_MOUNT"
  run sudo mount -o ro,noload LABEL=speciarl "$DATA_MOUNT"
fi
run .venv/bin/python -c 'from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("jax", "jaxlib", "libtpu")))'
