#!/usr/bin/env bash
# Asks for a TPU slice (a queued resource) and waits until it is there.
#
#   PROJECT=... ZONE=us-east5-a ACCELERATOR=v5p-32 SPOT=1 tpu_scripts/create.sh \
#     [--config=RECIPE [overrides]]
#
# With a recipe, `speciarl check` comes first: what it lacks (data, prompt, judges at JUDGE_URL and
# EVAL_JUDGE_URL) is told before anything is paid for.
# A request of this name that was suspended (a spot slice that was taken away) or has failed is
# deleted and made anew; one that is queued or there already is waited for.
# SPOT=1: cheaper, may be taken away; train.sh and restart.sh go on where it stopped.
# DATA_DISK=NAME: attaches a disk of the zone to every host, read-only, for what does not fit 100 GB
# (the 72B model). Fill it once on any VM: `mkfs.ext4 -L speciarl DEVICE`, mount, download, detach;
# then --config.model.path=/mnt/disks/data/FOLDER.
# WAIT_S: how long to wait, seconds (default one day). DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone that has the accelerator"
: "${WAIT_S:=86400}" "${POLL_S:=30}"

version=$(runtime_version)
place=(--project="$PROJECT" --zone="$ZONE")
create=(gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME"
  "${place[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$version")
[[ "${SPOT:-0}" == 1 ]] && create+=(--spot)
[[ -n "${SERVICE_ACCOUNT:-}" ]] && create+=(--service-account="$SERVICE_ACCOUNT")
if [[ -n "${DATA_DISK:-}" ]]; then
  disk=projects/$PROJECT/zones/$ZONE/disks/$DATA_DISK
  create+=(--data-disk="source=$disk,mode=read-only")
fi
describe=(gcloud compute tpus queued-resources describe "$TPU_NAME" "${place[@]}"
  --format="value(state.state)")
delete=(gcloud compute tpus queued-resources delete "$TPU_NAME" "${place[@]}" --force --quiet)

if (($#)); then
  take_recipe "$@"
  run "${SPECIARL:-speciarl}" check "${recipe[@]}"
fi
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  run "${describe[@]}"
  echo "would run, if it is SUSPENDED or FAILED: ${delete[*]}"
  run "${create[@]}"
  echo "would wait up to ${WAIT_S} s for ACTIVE"
  exit 0
fi

errors=$(mktemp)
trap 'rm "$errors"' EXIT
# The state of the request, or NONE.
look() {
  "${describe[@]}" 2>"$errors" && return
  grep --quiet NOT_FOUND "$errors" || fail "$TPU_NAME: cannot be looked up: $(<"$errors")"
  echo NONE
}

is_asked=0
deadline=$((SECONDS + WAIT_S))
while ((SECONDS < deadline)); do
  state=$(look)
  echo "$(date +%T) $TPU_NAME: $state"
  case "$state" in
    ACTIVE) exit 0 ;;
    NONE)
      "${create[@]}"
      is_asked=1
      ;;
    FAILED | SUSPENDED)
      ((is_asked)) && fail "$TPU_NAME is $state; look at it with: ${describe[*]}"
      "${delete[@]}"
      continue
      ;;
  esac
  sleep "$POLL_S"
done
fail "$TPU_NAME was not ACTIVE within $WAIT_S s; it stays queued (delete.sh removes it)"
