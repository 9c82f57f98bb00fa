#!/usr/bin/env bash
# On a worker: one job as a service of the machine, so that it outlives the connection.
#
#   tpu_scripts/service.sh start [NAME=VALUE ...] COMMAND ...
#   tpu_scripts/service.sh follow      # its log, until it ends, with its exit code
#   tpu_scripts/service.sh stop        # SIGTERM: it saves; waits until it has ended
#
# The log is speciarl.log here, appended to. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
unit=speciarl log=$PWD/speciarl.log
: "${POLL_S:=5}"

case "${1:-}" in
  start)
    shift
    (($#)) || fail "start: expected a command"
    if [[ "${DRY_RUN:-0}" != 1 ]]; then
      systemctl is-active --quiet "$unit" &&
        fail "a job runs here already; wait for it, or end it with tpu_scripts/job.sh stop"
      touch "$log" # for `follow`, which may come before the job's first line
      # An earlier job that failed still holds the name; if none did, there is nothing to forget.
      sudo systemctl reset-failed "$unit" 2>/dev/null || true
    fi
    # SIGTERM goes to the first process alone, which hands it on and waits for the save.
    run sudo systemd-run --unit="$unit" --uid="$(id -un)" --working-directory="$PWD" \
      --setenv=HOME="$HOME" --setenv=PATH="$PATH" --property=KillMode=mixed \
      --property=TimeoutStopSec=600 --property=StandardOutput="append:$log" \
      --property=StandardError="append:$log" env "$@"
    ;;
  follow)
    [[ -f "$log" ]] || fail "$log: no such file; nothing was started here"
    tail -n 50 -F "$log" &
    shown=$!
    trap 'kill "$shown"' EXIT
    while systemctl is-active --quiet "$unit"; do sleep "$POLL_S"; done
    sleep 1 # the last lines
    code=$(systemctl show --property=ExecMainStatus --value "$unit")
    echo "service.sh: ended with exit code $code"
    exit "$code"
    ;;
  stop) run sudo systemctl stop "$unit" ;;
  *) fail "usage: service.sh start COMMAND ... | follow | stop" ;;
esac
