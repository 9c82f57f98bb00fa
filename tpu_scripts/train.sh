#!/usr/bin/env bash
# Trains on every worker of a slice that setup.sh has prepared.
#
#   PROJECT=... ZONE=... WORKDIR=gs://BUCKET/runs/NAME JUDGE_URL=http://HOST:8000/v1 \
#     tpu_scripts/train.sh --config=configs/qwen2_5_vl_7b_v5p.py [--config.section.field=value ...]
#
# Each worker runs restart.sh, so a pre-empted process that keeps its machine goes on by itself. If
# Google takes the slice away, create.sh, setup.sh and this script again: the run is resumed.
# HF_TOKEN is passed on if it is set. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
need WORKDIR "run directory that all workers reach, gs://BUCKET/PATH"
need JUDGE_URL "judge endpoint, see judge.sh"
[[ "${1:-}" == --config=* ]] || fail "usage: train.sh --config=RECIPE [overrides]"

words=$(printf ' %q' "$WORKDIR" --cluster "$@" "--config.judge.endpoints=('$JUDGE_URL',)")
secrets=""
[[ -n "${HF_TOKEN:-}" && "${DRY_RUN:-0}" != 1 ]] && secrets="HF_TOKEN=$(printf %q "$HF_TOKEN") "
on_workers "cd $REMOTE_DIR && ${secrets}SPECIARL=.venv/bin/speciarl tpu_scripts/restart.sh$words"
