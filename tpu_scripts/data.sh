#!/usr/bin/env bash
# Builds data sets on this machine and copies them to a bucket, from which setup.sh brings them to
# every worker: before a slice is rented, and once instead of on each host.
#
#   DATA_URL=gs://BUCKET/data tpu_scripts/data.sh [cub flowers food pets cars aircraft]
#
# What is built already is not built again. SPECIARL names the program (default: speciarl),
# DATA_DIR the local folder. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need DATA_URL "folder of prepared data sets, gs://BUCKET/PATH"
: "${DATA_DIR:=$HOME/.cache/speciarl/data}"
(($#)) || set -- cub flowers food pets cars aircraft
for name in "$@"; do
  run "${SPECIARL:-speciarl}" data build "$name" --data_dir="$DATA_DIR"
done
run gcloud storage rsync --recursive "$DATA_DIR" "$DATA_URL"
