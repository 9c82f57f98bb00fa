#!/usr/bin/env bash
# Gives the slice back. Asks first: the name must be typed. Runs on gs:// stay.
#
#   PROJECT=... ZONE=... TPU_NAME=... tpu_scripts/delete.sh
#
# DRY_RUN=1 prints and does nothing. There is no option that skips the question.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
command=(gcloud compute tpus queued-resources delete "$TPU_NAME" --project="$PROJECT"
  --zone="$ZONE" --force --quiet)
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  echo "would ask for the name $TPU_NAME first"
  run "${command[@]}"
  exit 0
fi
echo "This deletes queued resource and TPU VMs '$TPU_NAME' in $PROJECT, $ZONE, and what is only on"
echo "their disks. Type the name to go on:"
answer=""
read -r answer || true
[[ "$answer" == "$TPU_NAME" ]] || fail "got '$answer', expected '$TPU_NAME': nothing was deleted"
run "${command[@]}"
