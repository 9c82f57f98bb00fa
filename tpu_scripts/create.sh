#!/usr/bin/env bash
# Asks for a TPU slice (a queued resource) and waits until it is there.
#
#   PROJECT=... ZONE=us-east5-a ACCELERATOR=v5p-32 SPOT=1 tpu_scripts/create.sh
#
# SPOT=1: cheaper, may be taken away; train.sh and restart.sh go on where it stopped.
# WAIT_S: how long to wait, seconds (default one day). DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone that has the accelerator"
: "${WAIT_S:=86400}"

version=$(runtime_version)
options=()
[[ "${SPOT:-0}" == 1 ]] && options+=(--spot)
[[ -n "${SERVICE_ACCOUNT:-}" ]] && options+=(--service-account="$SERVICE_ACCOUNT")
run gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
  --project="$PROJECT" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
  --runtime-version="$version" ${options[@]+"${options[@]}"}

describe=(gcloud compute tpus queued-resources describe "$TPU_NAME" --project="$PROJECT"
  --zone="$ZONE" --format="value(state.state)")
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  run "${describe[@]}"
  echo "would wait up to ${WAIT_S} s for ACTIVE"
  exit 0
fi
deadline=$((SECONDS + WAIT_S))
while ((SECONDS < deadline)); do
  state=$("${describe[@]}")
  echo "$(date +%T) $TPU_NAME: $state"
  case "$state" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) fail "$TPU_NAME is $state; look at it with: ${describe[*]}" ;;
  esac
  sleep 30
done
fail "$TPU_NAME was not ACTIVE within $WAIT_S s; it stays queued (delete.sh removes it)"
