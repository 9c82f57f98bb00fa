# shellcheck shell=bash
# Sourced by the other scripts: settings with their defaults, and `run`, which obeys DRY_RUN=1.
# Every setting is an environment variable; nothing here knows a project, a zone or a bucket.

: "${TPU_NAME:=speciarl}"            # queued resource and node
: "${ACCELERATOR:=v5p-32}"            # v5litepod-64, v5p-32, v6e-16, v4-32, ...
: "${REMOTE_DIR:=speciarl-jax}"      # on each worker, below its home directory
export TPU_NAME ACCELERATOR REMOTE_DIR

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# need NAME MEANING: stops with one line unless the variable is set. A dry run shows a placeholder.
need() {
  if [[ -z "${!1:-}" ]]; then
    [[ "${DRY_RUN:-0}" == 1 ]] || fail "$1 is not set: $2; e.g. $1=... $0"
    printf -v "$1" '%s' "<$1>"
  fi
}

# run COMMAND...: runs it, or prints it when DRY_RUN=1.
run() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf 'would run:'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# take_recipe --config=RECIPE [OVERRIDE...]: puts the words that name a recipe into `recipe`, where
# the judges are and a bucket's folder for compiled programs, so that a new slice need not compile
# again (COMPILE_CACHE= for none). What the user overrides comes last and wins.
take_recipe() {
  [[ "${1:-}" == --config=* ]] || fail "usage: $(basename "$0") --config=RECIPE [overrides]"
  recipe=("$1")
  [[ -n "${JUDGE_URL:-}" ]] && recipe+=("--config.judge.endpoints=('$JUDGE_URL',)")
  [[ -n "${EVAL_JUDGE_URL:-}" ]] && recipe+=("--config.eval.judge.endpoints=('$EVAL_JUDGE_URL',)")
  if [[ -n "${WORKDIR:-}" ]]; then
    recipe+=("--config.compile_cache_dir=${COMPILE_CACHE-${WORKDIR%/*}/xla-cache}")
  fi
  recipe+=("${@:2}")
}

# The software image that Cloud TPU asks for, by generation.
runtime_version() {
  case "$ACCELERATOR" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR=$ACCELERATOR: expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

# on_workers COMMAND [all|N]: the same command line on every host of the slice, or on one.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --project="$PROJECT" --zone="$ZONE" \
    --worker="${2:-all}" --command="$1"
}

# copy_to_workers FILE PATH: to every host, below its home directory.
copy_to_workers() {
  run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" --project="$PROJECT" --zone="$ZONE" \
    --worker=all
}

# start_job WORDS: a command line as a service of every host; then the first host's log until it
# ends. The job outlives this connection: `job.sh log` shows it again, `job.sh stop` ends it.
start_job() {
  on_workers "cd $REMOTE_DIR && tpu_scripts/service.sh start $1"
  on_workers "cd $REMOTE_DIR && tpu_scripts/service.sh follow" 0
}
