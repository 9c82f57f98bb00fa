#!/usr/bin/env bash
# Serves the judge with vLLM on a GPU machine beside the slice; run it on that machine.
#
#   tpu_scripts/judge.sh train        # port 8000: Qwen3-30B-A3B-Instruct-2507, FP8
#   tpu_scripts/judge.sh eval         # port 8001: Llama-3-70B-Instruct, four-way tensor parallel
#
# Memory: the training judge has 31 GB of weights and 98 kB of cache a token, the evaluation judge
# 141 GB (bfloat16) and 328 kB. The instructions are one shared prefix, a request adds about 100
# tokens, so 256 at a time need 2.5 and 8.4 GB: one GPU of 48 GB or two of 24 GB (GPUS=2) for the
# former, four of 48 GB for the latter. Any OpenAI-compatible endpoint does instead.
# Needs `pip install vllm`.
# PORT, GPUS, MODEL override the defaults. DRY_RUN=1 prints and does nothing.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in
  train) model=Qwen/Qwen3-30B-A3B-Instruct-2507-FP8 gpus=1 port=8000 ;;
  eval) model=meta-llama/Meta-Llama-3-70B-Instruct gpus=4 port=8001 ;;
  *) fail "usage: judge.sh train|eval" ;;
esac
run vllm serve "${MODEL:-$model}" --host 0.0.0.0 --port "${PORT:-$port}" \
  --tensor-parallel-size "${GPUS:-$gpus}" --max-model-len 2048 --max-num-seqs 256 \
  --gpu-memory-utilization 0.90 --enable-prefix-caching
