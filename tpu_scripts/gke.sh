#!/usr/bin/env bash
# Trains on a GKE cluster through Cluster Toolkit (`gcluster job submit`, a JobSet in a Kueue queue).
#
#   PROJECT=... ZONE=... CLUSTER=... IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/speciarl:TAG \
#     ACCELERATOR=v5p-32 TOPOLOGY=2x2x4 WORKDIR=gs://BUCKET/runs/NAME \
#     JUDGE_URL=http://HOST:8000/v1 EVAL_JUDGE_URL=http://HOST:8001/v1 \
#     tpu_scripts/gke.sh --config=configs/qwen2_5_vl_7b_v5p.py [overrides]
#
# ZONE: zone or region of the cluster. The topology is given and not derived: gcluster's short names
# count chips where ACCELERATOR counts v4's and v5p's cores. Needs `gcluster` and an image with this
# package installed (`pip install .[tpu,gcp]`), recipes included, in /app; data and a model that the
# hub does not give freely come through volumes (`gcluster job submit --mount`) or the image.
# Restarted, then resumed: 75 (pre-empted, saved), 134 (another host died), 137 and 143 (killed).
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone or region of the cluster"
need CLUSTER "GKE cluster"
need IMAGE "container image with this package"
need TOPOLOGY "chips of the slice, 2x2x4 for v5p-32"
need WORKDIR "run directory, gs://BUCKET/PATH"
need JUDGE_URL "judge endpoint, see judge.sh"
need EVAL_JUDGE_URL "endpoint of the judge that scores, see judge.sh"
take_recipe "$@"
case "$ACCELERATOR" in
  v4-*) machine=ct4p-hightpu-4t ;;
  v5litepod-*) machine=ct5lp-hightpu-4t ;;
  v5p-*) machine=ct5p-hightpu-4t ;;
  v6e-*) machine=ct6e-standard-4t ;;
  *) fail "ACCELERATOR=$ACCELERATOR: expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac

words=$(printf ' %q' "$WORKDIR" --cluster "${recipe[@]}")
# One start per pod: JobSet restarts all hosts of the slice together. `exec`, for a pod is stopped by
# SIGTERM to its first process, and a shell there would keep it for itself.
run gcluster job submit --project="$PROJECT" --location="$ZONE" --cluster="$CLUSTER" \
  --name="$TPU_NAME" --image="$IMAGE" --compute-type="$machine" --topology="$TOPOLOGY" \
  --num-slices=1 --restarts=100 --restart-on-exit-codes=75,134,137,143 --grace-period=10m \
  --command="cd /app && export MAX_RESTARTS=0 && exec tpu_scripts/restart.sh$words"
