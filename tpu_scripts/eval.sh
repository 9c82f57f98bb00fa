#!/usr/bin/env bash
# Scores a run on all hosts of a slice: six data sets, correctness, specificity, HM.
#
#   PROJECT=... ZONE=... WORKDIR=gs://BUCKET/runs/NAME EVAL_JUDGE_URL=http://HOST:8001/v1 \
#     tpu_scripts/eval.sh --config=configs/qwen2_5_vl_7b_v5p.py [--samples=64] [overrides]
#
# The judge is the recipe's eval.judge (the paper's is Llama-3-70B, `judge.sh eval`), not the one it
# trains with. A service of each worker, as in train.sh. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
need WORKDIR "run directory, gs://BUCKET/PATH"
need EVAL_JUDGE_URL "endpoint of the judge that scores, see judge.sh"
take_recipe "$@"

words=$(printf ' %q' "--workdir=$WORKDIR" --cluster "${recipe[@]}")
start_job ".venv/bin/speciarl eval$words"
