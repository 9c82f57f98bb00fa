#!/usr/bin/env bash
# Copies a run here, checkpoints left out unless CHECKPOINTS=1.
#
#   WORKDIR=gs://BUCKET/runs/NAME tpu_scripts/fetch.sh runs/NAME && speciarl report runs/NAME ...
#
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need WORKDIR "run directory, gs://BUCKET/PATH"
(($# == 1)) || fail "usage: fetch.sh LOCAL_DIR"
options=(--recursive)
[[ "${CHECKPOINTS:-0}" == 1 ]] || options+=(--exclude='^checkpoints/.*')
run mkdir -p "$1"
run gcloud storage rsync "${options[@]}" "$WORKDIR" "$1"
