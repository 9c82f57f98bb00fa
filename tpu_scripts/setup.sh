#!/usr/bin/env bash
# Copies the committed tree to every worker and installs it there with jax for TPU.
#
#   PROJECT=... ZONE=... tpu_scripts/setup.sh
#
# Uncommitted changes are not copied. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archive=$(mktemp -d)/source.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:source.tar.gz" --project="$PROJECT" \
  --zone="$ZONE" --worker=all
# The base images carry Python 3.10; the deadsnakes packages bring 3.11 beside it.
on_workers "set -e
command -v python3.11 >/dev/null || { sudo add-apt-repository -y ppa:deadsnakes/ppa && \
sudo apt-get install -y python3.11-venv; }
mkdir -p $REMOTE_DIR && tar -xzf source.tar.gz -C $REMOTE_DIR && cd $REMOTE_DIR
python3.11 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu,gcp]'
.venv/bin/python -c 'import jax; print(jax.process_index(), jax.local_devices())'"
