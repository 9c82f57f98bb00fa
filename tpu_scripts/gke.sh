#!/usr/bin/env bash
# Trains on a GKE cluster through xpk; the image is built from this repository's committed tree.
#
#   PROJECT=... ZONE=... CLUSTER=... IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/speciarl:TAG \
#     WORKDIR=gs://BUCKET/runs/NAME JUDGE_URL=http://HOST:8000/v1 \
#     tpu_scripts/gke.sh --config=configs/qwen2_5_vl_7b_v5p.py [overrides]
#
# Exit code 75 (pre-empted, saved) restarts the workload; it resumes. Needs `pip install xpk` and an
# image with this package installed (`pip install .[tpu,gcp]`), recipes included, in /app.
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the cluster"
need CLUSTER "xpk cluster"
need IMAGE "container image with this package"
need WORKDIR "run directory, gs://BUCKET/PATH"
need JUDGE_URL "judge endpoint, see judge.sh"
[[ "${1:-}" == --config=* ]] || fail "usage: gke.sh --config=RECIPE [overrides]"

words=$(printf ' %q' "$WORKDIR" --cluster "$@" "--config.judge.endpoints=('$JUDGE_URL',)")
# One start per pod: xpk restarts all hosts of the slice together.
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$TPU_NAME" --tpu-type="$ACCELERATOR" --docker-image="$IMAGE" --num-slices=1 \
  --max-restarts=100 --restart-on-exit-codes=75 \
  --command="cd /app && MAX_RESTARTS=0 tpu_scripts/restart.sh$words"
