#!/usr/bin/env bash
# Copies the committed tree to every worker and installs it there with jax for TPU (install.sh).
#
#   PROJECT=... ZONE=... [DATA_URL=gs://BUCKET/data] [DATA_DISK=NAME] tpu_scripts/setup.sh
#
# Uncommitted changes are not copied. DATA_URL: what data.sh has put there goes to every worker.
# DATA_DISK: the disk that create.sh attached is mounted at /mnt/disks/data. A token for the hub
# (HF_TOKEN, or HF_TOKEN_FILE) is copied as a file to where the hub's library looks for it, and is
# on no command line. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
temporary=$(mktemp -d)
trap 'rm -r "$temporary"' EXIT
run git -C "$root" archive --format=tar.gz --output="$temporary/source.tar.gz" HEAD
copy_to_workers "$temporary/source.tar.gz" source.tar.gz

token=${HF_TOKEN_FILE:-}
if [[ -z "$token" && -n "${HF_TOKEN:-}" ]]; then
  token=$temporary/token # in a folder of mode 700
  printf '%s' "$HF_TOKEN" >"$token"
fi
if [[ -n "$token" ]]; then
  on_workers "mkdir -p .cache && mkdir -p -m 700 .cache/huggingface"
  copy_to_workers "$token" .cache/huggingface/token
  on_workers "chmod 600 .cache/huggingface/token"
fi

settings=$(printf ' %q' DATA_URL="${DATA_URL:-}" DATA_DISK="${DATA_DISK:-}")
# Modules of an earlier version must not stay: the processes compare their files at start.
on_workers "rm -rf $REMOTE_DIR/speciarl_jax && mkdir -p $REMOTE_DIR && \
tar -xzf source.tar.gz -C $REMOTE_DIR && cd $REMOTE_DIR && env$settings tpu_scripts/install.sh"
