#!/usr/bin/env bash
# Looks after what train.sh or eval.sh has started on a slice.
#
#   PROJECT=... ZONE=... tpu_scripts/job.sh log [WORKER]   # until it ends; Ctrl-C ends the looking
#   PROJECT=... ZONE=... tpu_scripts/job.sh stop           # saves, then ends, on all workers
#
# DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "Google Cloud project"
need ZONE "zone of the slice"
case "${1:-}" in
  log) on_workers "cd $REMOTE_DIR && tpu_scripts/service.sh follow" "${2:-0}" ;;
  stop) on_workers "cd $REMOTE_DIR && tpu_scripts/service.sh stop" ;;
  *) fail "usage: job.sh log [WORKER] | stop" ;;
esac
