#!/usr/bin/env bash
# Trains on this machine and goes on after pre-emption, until the run ends.
#
#   tpu_scripts/restart.sh WORKDIR --config=RECIPE [--config.section.field=value ...]
#
# Exit code 75 of `speciarl train` means: stopped by SIGTERM, saved, start again. Any other code is
# passed on. A run that is there already is resumed (`--resume=auto`). MAX_RESTARTS (default 100) bounds the loop. A
# SIGTERM to this script is handed to the training, and its code is then the last word.
# SPECIARL names the program (default: speciarl). DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# >= 2)) || fail "usage: restart.sh WORKDIR --config=RECIPE [overrides]"
workdir=$1
shift
: "${MAX_RESTARTS:=100}" "${SPECIARL:=speciarl}"

command=("$SPECIARL" train "$@" --workdir="$workdir" --resume=auto)
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  run "${command[@]}"
  echo "would start again on exit code 75"
  exit 0
fi
child=0 stopped=0 interrupted=0
trap 'stopped=1; interrupted=1; kill -TERM "$child" 2>/dev/null || true' TERM
for ((attempt = 0; attempt <= MAX_RESTARTS; attempt++)); do
  "${command[@]}" &
  child=$!
  # A signal ends `wait` early, while the training still saves: wait again.
  interrupted=1
  while ((interrupted)); do
    interrupted=0 code=0
    wait "$child" || code=$?
  done
  ((code == 75 && stopped == 0)) || exit "$code"
  echo "restart.sh: pre-empted and saved; start $((attempt + 2))" >&2
done
echo "restart.sh: pre-empted more than MAX_RESTARTS=$MAX_RESTARTS times" >&2
exit 75
