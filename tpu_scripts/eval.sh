#!/usr/bin/env bash
# Scores a run on all hosts of a slice: six data sets, correctness, specificity, HM.
#
#   PROJECT=... ZONE=... WORKDIR=gs://BUCKET/runs/NAME JUDGE_URL=http://HOST:8000/v1 \
#     tpu_scripts/eval.sh --config=configs/qwen2_5_vl_7b_v5p.py [--samples=64] [overrides]
#
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
need WORKDIR "run directory, gs://BUCKET/PATH"
need JUDGE_URL "judge endpoint, see judge.sh"
[[ "${1:-}" == --config=* ]] || fail "usage: eval.sh --config=RECIPE [overrides]"

words=$(printf ' %q' --cluster "$@" "--workdir=$WORKDIR" "--config.judge.endpoints=('$JUDGE_URL',)")
on_workers "cd $REMOTE_DIR && .venv/bin/speciarl eval$words"
