#!/usr/bin/env bash
# Trains on every worker of a slice that setup.sh has prepared.
#
#   PROJECT=... ZONE=... WORKDIR=gs://BUCKET/runs/NAME JUDGE_URL=http://HOST:8000/v1 \
#     EVAL_JUDGE_URL=http://HOST:8001/v1 \
#     tpu_scripts/train.sh --config=configs/qwen2_5_vl_7b_v5p.py [--config.section.field=value ...]
#
# The training is a service of each worker and outlives this connection; what is shown is the log of
# worker 0 (job.sh shows it again, or stops the job). Each worker runs restart.sh, so a pre-empted
# process that keeps its machine goes on by itself. If Google takes the slice away, create.sh,
# setup.sh and this script again: the run is resumed, on a slice of another size too. Compiled
# programs are kept beside WORKDIR (COMPILE_CACHE=gs://..., or empty for none).
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
need WORKDIR "run directory that all workers reach, gs://BUCKET/PATH"
need JUDGE_URL "judge endpoint, see judge.sh"
need EVAL_JUDGE_URL "endpoint of the judge that scores, see judge.sh"
take_recipe "$@"

words=$(printf ' %q' "$WORKDIR" --cluster "${recipe[@]}")
start_job "SPECIARL=.venv/bin/speciarl tpu_scripts/restart.sh$words"
